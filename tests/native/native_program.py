"""Builds a program of the CPU kernels without Python, with the flags of the package's build."""

from __future__ import annotations

import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("kernel_calls.cpp", "std_threads.cpp")


def package_build() -> dict[str, Any]:
    """What setup.py defines."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def package_objects() -> Path:
    """The folder in which ``make build`` leaves the objects of the CPU module."""
    place = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return ROOT / "build" / place / "fastopt._native_cpu"


def build_program(name: str, flags: list[str] | None = None) -> Path:
    """Compiles and links ``name``.cpp with the kernels, and only what has changed.

    With ``flags``, the kernels are compiled anew with these as well; otherwise they are the
    package's own objects.

    Raises:
        SystemExit: It does not compile.
    """
    build = package_build()
    sets = " ".join(f"X({isa})" for isa in build["ISA_FLAGS"])
    defines = [f"-DFASTOPT_FOR_EACH_ISA(X)={sets}", *(flags or [])]
    file = build["NinjaFile"](build["find_compiler"](), defines)
    for source in build["PER_ISA_SOURCES"]:
        for isa, isa_flags in build["ISA_FLAGS"].items():
            more = [f"-DFASTOPT_ISA={isa}", *isa_flags]
            if flags is None:
                file.objects.append(str(package_objects() / f"{Path(source).stem}.{isa}.o"))
            else:
                file.compile(source, f"{Path(source).stem}.{isa}", more)
    for source in ("csrc/cpu/dispatch.cpp", "csrc/cpu/lstm_schedule.cpp"):
        file.compile(source)
    for source in (*SOURCES, f"{name}.cpp"):
        file.compile(f"tests/native/{source}")
    file.link_flags = ["-pthread", *(flags or [])]
    folder = ROOT / "build" / "native" / name
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    Path(folder, "build.ninja").write_text(file.text(program))
    command = [sys.executable, "-m", "ninja", "--quiet", "-C", str(folder)]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"{name} did not compile: see the compiler's messages above")
    return program

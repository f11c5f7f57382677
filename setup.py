"""Builds the native core with ninja: one object per source and instruction set.

Environment: CXX names the compiler, CXXFLAGS adds flags, FASTOPT_SANITIZE=1 instruments the
objects with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# -fno-math-errno and -fno-trapping-math: no loop with a square root vectorises without them.
COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
]
LINK_FLAGS = ["-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]

# From the plainest to the widest; csrc/cpu/dispatch.cpp picks at import.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    # GCC's own AVX-512 header raises the warning that is turned off (its bug 105593).
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    avx512 += ["-mprefer-vector-width=512", "-Wno-maybe-uninitialized"]
    ISA_FLAGS |= {"avx2": avx2, "avx512": avx512, "avx512bf16": [*avx512, "-mavx512bf16"]}

PER_ISA_SOURCES = ["csrc/cpu/optimizer_step.cpp", "csrc/cpu/grad_norm.cpp"]
COMMON_SOURCES = [
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/threads.cpp",
    "csrc/bindings/torch_access.cpp",
    "csrc/bindings/layout.cpp",
    "csrc/bindings/gradient_list.cpp",
    "csrc/bindings/group_rules.cpp",
    "csrc/bindings/step_plan.cpp",
    "csrc/bindings/optimizer_plan.cpp",
    "csrc/bindings/cpu_module.cpp",
]


class BuildError(SystemExit):
    """Ends the build with a message instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nfastopt: {message}\n")


def find_compiler() -> list[str]:
    """Returns the C++ compiler's command once it has compiled a small OpenMP program.

    Raises:
        BuildError: No compiler was found, or it failed; the message says what to install.
    """
    advice = (
        "Install GCC 9 or newer with OpenMP (Debian, Ubuntu: apt-get install g++; Fedora: dnf "
        "install gcc-c++; conda: conda install -c conda-forge gxx), or name one in CXX."
    )
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler: {' '.join(command) or 'CXX is empty'}. {advice}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\n#include <tuple>\nint main() { return 0; }\n")
        probe = [*command, *COMPILE_FLAGS, str(source), "-o", str(Path(folder, "probe"))]
        result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(
            f"the C++ compiler {' '.join(command)} failed on a small program. {advice}\n"
            f"{' '.join(probe)}\n{result.stderr}"
        )
    return command


def quote(words: list[str]) -> str:
    """Joins words for a ninja variable that a shell will read."""
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def ninja_file(compiler: list[str], target: Path) -> str:
    """Returns the text of the ninja file that builds the CPU module."""
    import pybind11

    for_each_isa = " ".join(f"X({isa})" for isa in ISA_FLAGS)
    flags = [
        *COMPILE_FLAGS,
        f"-I{ROOT / 'csrc'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
        f"-DFASTOPT_FOR_EACH_ISA(X)={for_each_isa}",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]
    link = [*LINK_FLAGS]
    if os.environ.get("FASTOPT_SANITIZE") == "1":
        flags += SANITIZE_FLAGS
        link += SANITIZE_FLAGS
    else:
        link += ["-s"]
    lines = [
        f"compiler = {quote(compiler)}",
        f"flags = {quote(flags)}",
        "rule compile",
        "  command = $compiler $flags $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compiling $out",
        "rule link",
        f"  command = $compiler $in -o $out {quote(link)}",
        "  description = linking $out",
    ]
    objects = []
    for source in PER_ISA_SOURCES:
        for isa, isa_flags in ISA_FLAGS.items():
            objects.append(f"{Path(source).stem}.{isa}.o")
            lines += [
                f"build {objects[-1]}: compile {ROOT / source}",
                f"  isa_flags = {quote([f'-DFASTOPT_ISA={isa}', *isa_flags])}",
            ]
    for source in COMMON_SOURCES:
        objects.append(f"{Path(source).stem}.o")
        lines.append(f"build {objects[-1]}: compile {ROOT / source}")
    lines += [f"build {target}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Replaces setuptools' compiler driver by one ninja run."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links `ext`, in parallel and only what has changed."""
        compiler = find_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, "build.ninja").write_text(ninja_file(compiler, target))
        command = [sys.executable, "-m", "ninja", "-C", str(folder)]
        if subprocess.run(command).returncode != 0:
            raise BuildError(
                f"the native core did not compile with {' '.join(compiler)}: see the compiler's "
                "messages above. GCC 9 or newer with C++17 and OpenMP is needed."
            )


setup(
    ext_modules=[Extension("fastopt._native_cpu", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)

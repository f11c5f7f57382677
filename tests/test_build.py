"""The build: what it says when it cannot, and what it leaves in the objects."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def source_tree(target: Path) -> Path:
    """What the sdist takes from a checkout, without anything built."""
    for name in ("csrc", "fastopt"):
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, **CUDA_OFF, **environment},
        timeout=900,
    )


CUDA_OFF = {"FASTOPT_CUDA": "off", "FASTOPT_HOST_SIM": "0"}


def test_no_compiler_says_what_to_install(tmp_path: Path) -> None:
    result = setup(source_tree(tmp_path), "build_ext", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler: no-such-compiler" in result.stderr
    assert "apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failing_compiler_is_shown(tmp_path: Path) -> None:
    result = setup(source_tree(tmp_path), "build_ext", CXX="false")
    assert result.returncode != 0
    assert "the C++ compiler false failed on a small program" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_objects_of_an_instruction_set_share_no_function_with_others() -> None:
    """A weak symbol would be merged: AVX-512 code could run where only the baseline may."""
    # NAME.ISA.o, as `make build` left them
    built = (ROOT / "build").glob("temp.*/fastopt._native_cpu/*.o")
    objects = [path for path in built if path.name.count(".") == 2]
    assert {p.name.split(".")[0] for p in objects} >= {
        *("optimizer_step", "grad_norm", "lstm", "attention", "cross_entropy")
    }
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in symbols.stdout.splitlines() if " W " in line or " u " in line]
        isa = path.name.split(".")[1]
        assert all(f"fastopt::{isa}::" in line for line in weak), weak


def test_sdist_has_the_sources_and_wheel_builds_from_it(tmp_path: Path) -> None:
    """Torch is not imported on the way: it is no build requirement."""
    tree = source_tree(tmp_path / "tree" if (tmp_path / "tree").mkdir() is None else tmp_path)
    blocker = tmp_path / "block" / "torch"
    blocker.mkdir(parents=True)
    (blocker / "__init__.py").write_text("raise ImportError('the build imported torch')")
    environment = {"PYTHONPATH": str(blocker.parent)}
    result = setup(tree, "sdist", **environment)
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "unpacked", filter="data")
    for needed in ("core/update_rules.h", "cuda/optimizer_step.cu", "host_sim/cuda.h", "py.typed"):
        assert any(name.endswith(needed) for name in names), needed
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    result = setup(unpacked, "bdist_wheel", **environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = (unpacked / "dist").glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("fastopt/_native_cpu") for name in files)
    assert "fastopt/py.typed" in files and "fastopt/_native_cpu.pyi" in files
    assert not any(name.startswith(("csrc", "tests", "bench")) for name in files)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"FASTOPT_CUDA": "maybe"}, "FASTOPT_CUDA must be auto, on or off, got 'maybe'"),
        ({"FASTOPT_CUDA": "on", "FASTOPT_CUDA_ARCHS": "80,90"}, "FASTOPT_CUDA_ARCHS must list"),
        ({"FASTOPT_CUDA": "on", "PATH": "", "CUDA_HOME": ""}, "Install NVIDIA's CUDA toolkit"),
    ],
    ids=str,
)
def test_wrong_settings_of_cuda(tmp_path: Path, environment: dict[str, str], text: str) -> None:
    if "PATH" in environment and shutil.which("nvcc", path="/usr/local/cuda/bin"):
        pytest.skip("nvcc is where it is looked for without PATH")
    if "FASTOPT_CUDA_ARCHS" in environment and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    result = setup(source_tree(tmp_path), "build_ext", **environment)
    assert result.returncode != 0
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def ptxas_reports() -> list[Path]:
    return sorted((ROOT / "build").glob("temp.*/fastopt._native_cuda/*.ptxas"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_do_not_spill() -> None:
    """By the report that the build keeps: registers, shared memory, spills of every kernel.

    Those that keep an LSTM's weights or an attention's sums in registers take nearly all there are,
    and may leave a few values that are used once a step in local memory.
    """
    reports = [path for path in ptxas_reports() if "registers" in path.read_text()]
    assert reports
    for path in reports:
        # Of a host function that device code calls, nvcc warns, and leaves the kernel empty.
        assert "warning" not in path.read_text(), path
        kernels = re.findall(
            r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?"
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            path.read_text(),
            flags=re.DOTALL,
        )
        assert kernels
        for name, arch, stores, loads, registers in kernels:
            lives_there = re.search(r"lstm_(for|back)ward_kernel|attention_", name) is not None
            spills = max(int(stores), int(loads))
            assert spills <= (64 if lives_there else 0), f"{name} spills {spills} on {arch}"
            most = 255 if lives_there else 128
            assert int(registers) <= most, f"{name} takes {registers} registers on {arch}"


@pytest.mark.skipif(not list((ROOT / "fastopt").glob("_native_cuda.*.so")), reason="no CUDA module")
def test_the_cuda_module_needs_no_cuda_library_and_says_what_is_missing() -> None:
    (module,) = (ROOT / "fastopt").glob("_native_cuda.*.so")
    linked = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcu|libtorch|libc10", linked)
    code = "import fastopt; from fastopt import _native_cuda as c; print(c.unavailable())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert torch.cuda.is_available() or "CUDA" in result.stdout

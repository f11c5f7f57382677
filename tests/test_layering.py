"""The arrows: core <- cpu, cuda <- bindings <- backends <- ops <- optim, nn <- integrations."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SUFFIXES = (".h", ".cpp", ".cu", ".cuh")

# Each room with the rooms that it may include or import.
NATIVE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda", "host_sim"},
    "host_sim": {"core", "host_sim"},
    "bindings": {"core", "cpu", "cuda", "host_sim", "bindings"},
}
PYTHON = {
    "backends": {"backends", "_native_cpu", "_native_cuda"},
    "ops": {"ops", "backends"},
    "optim": {"optim", "ops", "backends"},
    "nn": {"nn", "ops", "backends"},
    "integrations": {"integrations", "nn", "optim", "ops", "backends"},
}


@pytest.mark.parametrize("room", NATIVE)
def test_native_includes(room: str) -> None:
    files = [p for p in (ROOT / "csrc" / room).iterdir() if p.suffix in SUFFIXES]
    assert files
    for path in files:
        for included in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert included.split("/")[0] in NATIVE[room], f"{path.name} includes {included}"
            assert (ROOT / "csrc" / included).exists()


def test_only_the_bindings_know_python_and_nothing_knows_torchs_headers() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert not re.search(r"#include <(torch|ATen|c10)/", text), path
        if path.parent.name != "bindings":
            assert not re.search(r"#include <(pybind11|Python)", text), path
        if path.parent.name == "core":
            assert not re.search(r"#pragma omp|<omp|immintrin", text), path


@pytest.mark.parametrize("room", PYTHON)
def test_python_imports(room: str) -> None:
    for path in (ROOT / "fastopt" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: relative import"
                modules = [node.module or ""]
                if node.module == "fastopt":
                    modules = [f"fastopt.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if module.split(".")[0] == "fastopt":
                    assert module.split(".")[1] in PYTHON[room], f"{path.name} imports {module}"


def test_no_device_names_outside_the_backends() -> None:
    for path in (ROOT / "fastopt").rglob("*.py"):
        if "backends" in path.parts or path.name == "__main__.py":
            continue
        assert not re.search(r"is_cuda|is_cpu|HAS_TRITON|device\.type", path.read_text()), path

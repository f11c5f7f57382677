"""Types as a user's checker sees them: stubs of the native modules, a program in strict mode."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
STUBS = [
    path for path in (ROOT / "fastopt").glob("*.pyi") if list(path.parent.glob(f"{path.stem}.*.so"))
]

PROGRAM = """
import torch
from torch import Tensor

import fastopt
from fastopt import nn, optim
from fastopt.nn.functional import attention, linear_cross_entropy, scaled_dot_product_attention


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, num_layers=2, bidirectional=True, weight_dropout=0.1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = self.lstm(inputs)
        mixed, _ = self.attention(hidden, hidden, hidden)
        loss: Tensor = linear_cross_entropy(mixed.flatten(0, 1), self.head.weight, targets)
        return loss


model = Tagger()
optimizer = optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, state_storage="8bit")
as_torch_has_it: torch.optim.Optimizer = optimizer
scheduler = optim.warmup_cosine(optimizer, warmup_steps=1, total_steps=10)
loss = model(torch.randn(3, 4, 8), torch.zeros(12, dtype=torch.long))
loss.backward()
with fastopt.use_backend("cpu"):
    optimizer.step()
scheduler.step()
query = torch.randn(1, 2, 5, 8)
output: Tensor = scaled_dot_product_attention(query, query, query, is_causal=True)
windowed = attention(query, query, query, causal=True, window_size=(2, 0))
assert isinstance(windowed, Tensor)
print(fastopt.explain(optimizer), fastopt.convert(model), output.shape, windowed.shape)
"""

# Each line has an argument of a type that the function above it does not take.
WRONG = """
from fastopt import nn, optim

nn.LSTM("8", 16)
optim.SGD([], lr="fast")
optim.AdamW([], state_storage=8)
"""


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, **options)


def test_stubs_name_what_the_modules_have() -> None:
    assert STUBS
    modules = [f"fastopt.{path.stem}" for path in STUBS]
    allowlist = Path(__file__).with_name("stubtest_allowlist.txt")
    options = ["--allowlist", allowlist, "--ignore-unused-allowlist"]
    result = run(sys.executable, "-m", "mypy.stubtest", *options, *modules, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def signatures_of_stub(path: Path) -> dict[str, list[str]]:
    """Functions and methods with the names of their arguments; a constructor by its class."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        for place in [node, *getattr(node, "body", [])]:
            if isinstance(place, ast.FunctionDef) and not place.decorator_list:
                prefix = f"{node.name}." if place is not node else ""
                found[prefix + place.name] = [argument.arg for argument in place.args.args]
    return found


def signatures_of_module(module: ModuleType) -> dict[str, list[str]]:
    """The same, by what pybind11 writes into the first line of a docstring."""
    found = {}
    for name, value in vars(module).items():
        members = vars(value) if isinstance(value, type) else {}
        for full, function in [(name, value), *((f"{name}.{n}", m) for n, m in members.items())]:
            plain = full.rsplit(".", 1)[-1]
            signature = re.match(rf"\s*{plain}\((.*)\) -> ", getattr(function, "__doc__", "") or "")
            if callable(function) and signature:
                found[full] = re.findall(r"(\w+): ", signature.group(1))
    return found


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_stubs_name_the_arguments(stub: Path) -> None:
    """Of compiled functions stubtest sees the names alone."""
    module = importlib.import_module(f"fastopt.{stub.stem}")
    assert signatures_of_stub(stub) == signatures_of_module(module)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the package's Python files as a wheel has them."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    site_packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", site_packages]
    result = run(*build, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    Path(site_packages, "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "bin" / "python"


@pytest.mark.parametrize(("program", "wrong"), [(PROGRAM, 0), (WRONG, 3)], ids=["right", "wrong"])
def test_programs_in_strict_mode(installed: Path, tmp_path: Path, program: str, wrong: int) -> None:
    """A checker takes what is right, and finds what is wrong: not everything is ``Any``."""
    path = tmp_path / "program.py"
    path.write_text(program)
    places = ["--python-executable", installed, "--cache-dir", installed.parent / "cache"]
    environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
    result = run(
        sys.executable, "-m", "mypy", "--strict", *places, path, cwd=tmp_path, env=environment
    )
    errors = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert len(errors) == wrong and (result.returncode != 0) == (wrong > 0), result.stdout
    assert all("[arg-type]" in line or "[call-overload]" in line for line in errors), errors

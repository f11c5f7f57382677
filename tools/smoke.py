"""Checks an installed fastopt against the torch beside it: ``python tools/smoke.py``.

Needs nothing but the two, so that it runs wherever a wheel does.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.testing import assert_close

import fastopt


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def trained(optim: object, name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small model after three steps of ``optim.name``."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3))
    optimizer: torch.optim.Optimizer = getattr(optim, name)(model.parameters(), lr=1e-2)
    go_on(model, optimizer)
    return model, optimizer


def go_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs = torch.linspace(-1, 1, 35).view(5, 7)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def check_place() -> None:
    """The package is the installed one; a source tree would hide what the wheel lacks."""
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    place = Path(fastopt.__file__).resolve().parent
    assert place.parent in installed, f"{place} is not in {installed}"
    assert Path(place, "py.typed").exists() and Path(place, "_native_cpu.pyi").exists()


def check_optimizers() -> None:
    """Three steps as torch makes them, by our kernels, and three more from its checkpoint."""
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax", "RAdam", "NAdam"):
        stock, stock_optimizer = trained(torch.optim, name)
        ours, optimizer = trained(fastopt.optim, name)
        assert {row.backend for row in fastopt.explain(optimizer).parameters} == {"cpu"}
        assert_close(list(ours.parameters()), list(stock.parameters()))
        written = io.BytesIO()
        torch.save(stock_optimizer.state_dict(), written)
        written.seek(0)
        optimizer.load_state_dict(torch.load(written))
        ours.load_state_dict(stock.state_dict())
        go_on(stock, stock_optimizer)
        go_on(ours, optimizer)
        assert_close(list(ours.parameters()), list(stock.parameters()))
        assert_close(optimizer.state_dict()["state"], stock_optimizer.state_dict()["state"])


def check_lstm() -> None:
    stock = torch.nn.LSTM(5, 9, num_layers=2, bidirectional=True)
    ours = fastopt.nn.LSTM(5, 9, num_layers=2, bidirectional=True)
    ours.load_state_dict(stock.state_dict())
    inputs = torch.randn(4, 3, 5)
    results = []
    for module in (stock, ours):
        output, states = module(inputs)
        loss = output.square().sum() + states[1].sum()
        results.append([output, *states, *gradients(loss, list(module.parameters()))])
    assert_close(results[1], results[0])


def check_attention() -> None:
    inputs = [torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3)]
    results = []
    for function in (
        torch.nn.functional.scaled_dot_product_attention,
        fastopt.nn.functional.scaled_dot_product_attention,
    ):
        output = function(*inputs, is_causal=True)
        results.append([output, *gradients(output.square().sum(), inputs)])
    assert_close(results[1], results[0])


def check_linear_cross_entropy() -> None:
    inputs = [torch.randn(6, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)]
    targets = torch.arange(6)
    ours = fastopt.nn.functional.linear_cross_entropy(*inputs, targets)
    stock = torch.nn.functional.cross_entropy(inputs[0] @ inputs[1].T, targets)
    assert_close([ours, *gradients(ours, inputs)], [stock, *gradients(stock, inputs)])


def check_compile() -> None:
    """The compiler traces a call of an operator whole, and its derivative."""
    inputs = [torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3)]

    def loss(*inputs: Tensor) -> Tensor:
        return fastopt.nn.functional.scaled_dot_product_attention(*inputs).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = loss(*inputs)
    actual = compiled(*inputs)
    assert_close([actual, *gradients(actual, inputs)], [expected, *gradients(expected, inputs)])


def check_conversion() -> None:
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(model)
    fastopt.convert(ours)
    assert isinstance(ours, fastopt.nn.TransformerEncoderLayer)
    inputs = torch.randn(2, 5, 8)
    assert_close(ours(inputs), model(inputs))


def check_one_openmp() -> None:
    """Torch's own copy; a second one would start threads of its own."""
    maps = Path("/proc/self/maps").read_text().split()
    copies = {path for path in maps if "libgomp" in Path(path).name}
    torch_folder = Path(torch.__file__).parent
    assert len(copies) == 1 and all(torch_folder in Path(path).parents for path in copies), copies


def check_info() -> None:
    command = [sys.executable, "-m", "fastopt", "info"]
    with tempfile.TemporaryDirectory() as elsewhere:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=elsewhere)
    print(result.stdout)
    assert fastopt.__version__ in result.stdout and torch.__version__ in result.stdout


CHECKS: list[Callable[[], None]] = [
    *(check_place, check_info, check_optimizers, check_lstm, check_attention),
    *(check_linear_cross_entropy, check_conversion, check_compile, check_one_openmp),
]

if __name__ == "__main__":
    torch.manual_seed(0)
    for check in CHECKS:
        check()
        print(f"{check.__name__}: passed")

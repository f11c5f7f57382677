"""Any memory layout: right, and no byte touched outside the tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from canaries import LAYOUTS, framed
from cases import ALL, OptimizerCase, random
from tolerances import assert_matches

IDS = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], **IDS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ALL[::4], **IDS)
def test_layouts(case: OptimizerCase, layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    shape = (3, 5, 4, 6) if "channels_last" in (layout, grad_layout) else (37, 29)
    generator = torch.Generator().manual_seed(0)
    values = random(shape, dtype, generator)
    frame = framed(values, layout)
    param = torch.nn.Parameter(frame.tensor)
    truth = torch.nn.Parameter(values.clone())
    optimizer, reference = (
        case.make([param], backend="cpu"),
        case.make([truth], backend="reference"),
    )
    for _ in range(3):
        grad = framed(random(shape, dtype, generator), grad_layout)
        before = grad.buffer.clone()
        param.grad = grad.tensor
        truth.grad = grad.tensor.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(grad.buffer, before)
    frame.check()
    assert param.data_ptr() == frame.tensor.data_ptr()
    # Stepped three times in low precision, so compared as the reference rounds: within one unit.
    assert_matches(param.detach(), truth.detach(), op="rounded once", dtype=dtype)


@pytest.mark.parametrize("case", ALL, **IDS)
def test_expanded_gradient(case: OptimizerCase) -> None:
    ours, truth = (torch.nn.Parameter(torch.ones(6, 700)) for _ in range(2))
    optimizer = case.make([ours], backend="cpu")
    reference = case.make([truth], backend="reference")
    for grad in (torch.randn(700).expand(6, 700), torch.randn(6, 1).expand(6, 700)):
        ours.grad, truth.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
    assert_matches(ours.detach(), truth.detach(), op="optimizer", dtype=torch.float32)


@pytest.mark.parametrize("case", ALL, **IDS)
def test_state_with_strides_of_its_own(case: OptimizerCase) -> None:
    """Checkpoints may bring state in another order than the parameter's."""
    ours, truth = (torch.nn.Parameter(torch.randn(33, 20, generator=_seeded())) for _ in range(2))
    optimizer, reference = case.make([ours], backend="cpu"), case.make([truth], backend="reference")
    for step in range(3):
        grad = torch.randn(33, 20)
        ours.grad, truth.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
        if step == 0:
            for key, value in optimizer.state[ours].items():
                if value.dim():
                    optimizer.state[ours][key] = value.t().contiguous().t()
    assert_matches(ours.detach(), truth.detach(), op="optimizer", dtype=torch.float32)


def test_parameters_that_share_memory_are_stepped_one_after_the_other() -> None:
    def run(backend: str) -> Tensor:
        buffer = torch.linspace(-1, 1, 5000)
        params = [
            torch.nn.Parameter(view)
            for view in (buffer[:3000], buffer[2000:], buffer[::2], buffer[1::2])
        ]
        optimizer = ALL[2].make(params, backend=backend)
        for _ in range(3):
            for index, param in enumerate(params):
                param.grad = torch.full_like(param, index + 1.0)
            optimizer.step()
        return buffer

    assert_matches(run("cpu"), run("torch"), op="optimizer", dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group_is_stepped_twice() -> None:
    def run(backend: str) -> Tensor:
        param = torch.nn.Parameter(torch.ones(2000))
        optimizer = ALL[6].make([param, param], backend=backend)
        for _ in range(3):
            param.grad = torch.linspace(-1, 1, 2000)
            optimizer.step()
        return param.detach()

    assert_matches(run("cpu"), run("torch"), op="optimizer", dtype=torch.float32)


def test_a_gradient_that_is_the_parameter_itself() -> None:
    ours, stock = (torch.nn.Parameter(torch.randn(40, 40, generator=_seeded())) for _ in "ab")
    for param, backend in ((ours, "cpu"), (stock, "torch")):
        optimizer = ALL[0].make([param], backend=backend)
        param.grad = param.detach()
        optimizer.step()
    assert_matches(ours.detach(), stock.detach(), op="optimizer", dtype=torch.float32)


def test_a_gradient_that_overlaps_the_parameter_raises_as_in_stock() -> None:
    param = torch.nn.Parameter(torch.randn(40, 40))
    param.grad = param.detach().t()
    optimizer = ALL[0].make([param])
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        optimizer.step()


def test_an_overlapping_parameter_raises_as_in_stock() -> None:
    param = torch.nn.Parameter(torch.ones(1).expand(8))
    param.grad = torch.ones(8)
    stock = torch.optim.SGD([param], lr=0.1, foreach=False)
    with pytest.raises(RuntimeError) as theirs:
        stock.step()
    with pytest.raises(RuntimeError) as ours:
        ALL[0].make([param]).step()
    assert str(ours.value) == str(theirs.value)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)

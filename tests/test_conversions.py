"""Half and bfloat16: every value in, every rounding out, on the instruction set in use."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from fastopt import _native_cpu, optim

LOW_PRECISION = (torch.bfloat16, torch.float16)


def test_the_instruction_set_is_the_one_asked_for() -> None:
    expected = os.environ.get("FASTOPT_EXPECTED_ISA")
    assert expected in (None, _native_cpu.instruction_set)


def test_the_module_is_the_one_asked_for() -> None:
    """A sanitized build that is not the one imported would find nothing."""
    assert os.environ.get("FASTOPT_EXPECTED_PATH", "") in str(_native_cpu.__file__)


def all_values(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def sgd_step(param: Tensor, grad: Tensor, lr: float) -> Tensor:
    """param - lr * grad, computed in fp32 and rounded once."""
    parameter = torch.nn.Parameter(param.clone())
    parameter.grad = grad
    optim.SGD([parameter], lr=lr, backend="cpu").step()
    return parameter.detach()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_every_value_is_read_and_written_as_it_is(dtype: torch.dtype) -> None:
    values = all_values(dtype)
    result = sgd_step(values, torch.zeros_like(values), 0.0)
    finite = ~values.isnan()
    assert torch.equal(result[finite].view(torch.int16), values[finite].view(torch.int16))
    assert result[~finite].isnan().all()


@pytest.mark.parametrize("step", [2.0**-8, 2.0**-9, 2.0**-11, 2.0**-12, 3 * 2.0**-13, 2.0**-26])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_rounding_is_to_nearest_even(dtype: torch.dtype, step: float) -> None:
    """Results on and beside the middle between two neighbours, and past the largest."""
    values = all_values(dtype)
    values = values[values.isfinite()]
    for sign in (1.0, -1.0):
        result = sgd_step(values, sign * values, step)
        truth = (values.double() - sign * step * values.double()).float().to(dtype)
        assert torch.equal(result, truth)


def test_half_overflows_at_the_middle() -> None:
    values = torch.full((16,), 65504.0, dtype=torch.float16)
    just_below = sgd_step(values, torch.full_like(values, -15.984375), 1.0)
    at_the_middle = sgd_step(values, torch.full_like(values, -16.0), 1.0)
    assert (just_below == 65504.0).all() and at_the_middle.isinf().all()

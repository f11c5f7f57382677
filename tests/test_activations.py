"""exp, sigmoid and tanh as the kernels compute them, over the whole range of fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastopt import _native_cpu
from tolerances import ACTIVATION_ULPS

FUNCTIONS = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
# The kernels take what is smaller for zero: e^x / 2 has to be a normal number.
SMALLEST = {torch.float32: 2.0**-125, torch.float64: 2.0**-1021}
MANTISSA_BITS = {torch.float32: 24, torch.float64: 53}


def activate(function: str, values: Tensor) -> Tensor:
    """The kernels' function, into memory that was NaN."""
    result = torch.full_like(values, torch.nan)
    _native_cpu.activate(function, values, result)
    return result


def errors_in_ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """The distance in units of the exact value's last place."""
    exponent = torch.frexp(exact).exponent - MANTISSA_BITS[actual.dtype]
    return (actual.double() - exact).abs() * torch.exp2(-exponent.double())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_error_over_all_of_fp32(function: str) -> None:
    """Every 251st bit pattern; 251 is a prime, so that no bit of the mantissa is left out."""
    bits = torch.arange(-(2**31), 2**31, 251, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    actual, exact = activate(function, values), FUNCTIONS[function](values.double())
    assert torch.equal(actual.isnan(), values.isnan())
    tiny, huge = exact.abs() <= SMALLEST[torch.float32], exact > torch.finfo(torch.float32).max
    normal = ~(tiny | huge | exact.isnan())
    assert errors_in_ulps(actual[normal], exact[normal]).max() <= ACTIVATION_ULPS
    assert (actual[tiny].abs() <= 2 * SMALLEST[torch.float32]).all()
    assert actual[huge].isinf().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_error_in_double_precision(function: str) -> None:
    """Torch's own is within a unit; the kernels' bound is wider by more than that."""
    values = torch.cat([torch.randn(100_000).double() * scale for scale in (1e-8, 0.1, 1, 5, 30)])
    exact = FUNCTIONS[function](values)
    assert errors_in_ulps(activate(function, values), exact).max() <= ACTIVATION_ULPS


@pytest.mark.parametrize("dtype", SMALLEST, ids=str)
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("exp", [torch.inf, 0.0, 1.0, 1.0, torch.nan]),
        ("sigmoid", [1.0, 0.0, 0.5, 0.5, torch.nan]),
        ("tanh", [1.0, -1.0, 0.0, -0.0, torch.nan]),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_special_values(
    function: str, expected: list[float], dtype: torch.dtype, count: int
) -> None:
    """Alone, and in vectors."""
    values = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan] * count**3, dtype=dtype)
    wanted = torch.tensor(expected * count**3, dtype=dtype)
    actual = activate(function, values)
    assert torch.equal(actual.nan_to_num(nan=7), wanted.nan_to_num(nan=7))
    assert torch.equal(actual.signbit()[~wanted.isnan()], wanted.signbit()[~wanted.isnan()])


def test_what_is_refused() -> None:
    values = torch.ones(3)
    with pytest.raises(ValueError, match="function must be exp, sigmoid or tanh, got sine"):
        _native_cpu.activate("sine", values, values)
    with pytest.raises(ValueError, match=r"output must be contiguous, of shape \[3\]"):
        _native_cpu.activate("exp", values, torch.ones(4))
    with pytest.raises(ValueError, match="fp32 or fp64"):
        _native_cpu.activate("exp", values.half(), values.half())

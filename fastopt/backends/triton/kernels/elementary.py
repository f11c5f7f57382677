"""Functions that Triton has not, or not for every type."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hyperbolic_tangent(x):
    """The quotient loses digits near zero, where the series has them all, in fp64 too."""
    power = tl.exp(-2 * tl.abs(x))
    magnitude = (1 - power) / (1 + power)
    y = x * x
    series = 21844 / 6081075 - y * (929569 / 638512875)
    series = 62 / 2835 - y * (1382 / 155925 - y * series)
    series = 1 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * series)))
    quotient = tl.where(x < 0, -magnitude, magnitude)
    return tl.where(tl.abs(x) < 0.125, x * series, quotient)

"""How kernels widen and round.

Triton's interpreter holds bf16 as bits, and neither computes with it nor rounds to it rightly. What
is loaded is therefore widened at once, and ``INTERPRETED`` has the interpreter round by hand and
multiply in fp32 what it has rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton import launch

INTERPRETED = tl.constexpr(launch.interpreted())


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 rounded to nearest, as a value of DTYPE; in the interpreter bf16 is held in fp32."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        is_number = x == x
        return tl.where(is_number, nearest, bits | 0x400000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def multiply_add(x, y, summand):
    """Of fp32, rounded once."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + summand).to(tl.float32)
    return tl.fma(x, y, summand)


@triton.jit
def as_factor(x):
    """What was loaded, as an operand of ``tl.dot``."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x


@triton.jit
def store_rounded(pointers, x, mask):
    """Stores fp32, or fp64, as the pointers' type."""
    tl.store(
        pointers, rounded(x, pointers.dtype.element_ty).to(pointers.dtype.element_ty), mask=mask
    )

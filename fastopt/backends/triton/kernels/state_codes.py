"""The codes of csrc/core/state_codes.h: parameters and state between how they are stored and fp32.

Values and chances are tiles of elements that lie one behind the other, whole blocks of them, on
bits of uint32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.philox import LANES, RANDOM_GROUP, philox
from fastopt.backends.triton.kernels.precision import multiply_add

# How a slot is stored, and what a parameter is beside its own bits.
BFLOAT16 = tl.constexpr(2)
BLOCKWISE8 = tl.constexpr(3)
STOCHASTIC = tl.constexpr(1)
KAHAN = tl.constexpr(2)
MASTER = tl.constexpr(3)
SLOT_TYPES = (None, tl.float32, tl.bfloat16, tl.uint8)

CODE_BLOCK = tl.constexpr(256)
ELEMENTS_OF_GROUP = tl.constexpr(4096)

_GOLDEN_TURN = tl.constexpr(40503)
_OFFSET = tl.constexpr(2.0**-15)
_BASE = tl.constexpr(112 << 23)  # the bits of it
_SMALLEST = tl.constexpr(1e-37)
_UPPER_HALF = tl.constexpr(0xFFFF0000)
_QUIET = tl.constexpr(0x400000)


@triton.jit
def drawn(seed, number, step, group):
    """The random words of a group, for its 64 places."""
    lane = (group * LANES + tl.arange(0, LANES)).to(tl.uint32)
    row = (step + lane * 0).to(tl.uint32)
    head = (number + lane * 0).to(tl.uint32)
    low = seed.to(tl.int32)
    high = (seed >> 32).to(tl.int32)
    first, second, third, fourth = philox(lane, row, head, low, high)
    words = tl.join(tl.join(first, second), tl.join(third, fourth))
    return tl.reshape(tl.permute(words, (2, 1, 0)), (RANDOM_GROUP,))


@triton.jit
def _repeated(words, TILE: tl.constexpr):
    ROWS: tl.constexpr = TILE // RANDOM_GROUP
    return tl.broadcast_to(words[None, :], (ROWS, RANDOM_GROUP))


@triton.jit
def state_chances(words, TILE: tl.constexpr):
    """Below 2^16, of the state of elements."""
    return tl.reshape(_repeated(words >> 16, TILE), (TILE,))


@triton.jit
def param_chances(words, first, TILE: tl.constexpr):
    """The same of the parameters from ``first`` on, each turned against those before."""
    ROWS: tl.constexpr = TILE // RANDOM_GROUP
    row = (first // RANDOM_GROUP + tl.arange(0, ROWS)) % (ELEMENTS_OF_GROUP // RANDOM_GROUP)
    turns = (row * _GOLDEN_TURN).to(tl.uint32)
    return tl.reshape((_repeated(words, TILE) + turns[:, None]) & 0xFFFF, (TILE,))


@triton.jit
def _bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _number_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _unless_nan(x, bits):
    """``bits``, or those of a quiet NaN where x is one."""
    return tl.where(x == x, bits, _bits_of(x) | _QUIET)


@triton.jit
def near(x, chance):
    """A bf16 next to x, as fp32; 2^15 is the chance that rounds to the nearest."""
    return _number_of(_unless_nan(x, _bits_of(x) + chance) & _UPPER_HALF)


@triton.jit
def master_remainder(x, param):
    """What x has more than the bf16, as the difference of the bits."""
    return (_unless_nan(x, _bits_of(x)) - _bits_of(param)).to(tl.uint16)


@triton.jit
def with_master_remainder(param, remainder):
    """The way back."""
    lower = remainder.to(tl.uint32)
    whole = _number_of(_bits_of(param) + (lower ^ 0x8000) - 0x8000)
    return tl.where(whole == whole, whole, param)


@triton.jit
def with_kahan_remainder(param, remainder):
    """The same of numbers; what rounding to the parameter cannot have lost is none."""
    lost = tl.abs(param) - tl.abs(remainder) * 256.0
    return param + tl.where(lost < 0, 0.0, remainder)


@triton.jit
def largest_of_blocks(x, mask):
    """The largest magnitude of each block; a NaN where there is one, or an infinity."""
    BLOCKS: tl.constexpr = x.shape[0] // CODE_BLOCK
    magnitude = tl.where(mask, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = tl.max(tl.reshape(magnitude, (BLOCKS, CODE_BLOCK)), 1).to(tl.float32, bitcast=True)
    return tl.where(largest < float("inf"), largest, float("nan"))


@triton.jit
def _to_elements(of_blocks):
    """What blocks have, for each of their elements."""
    BLOCKS: tl.constexpr = of_blocks.shape[0]
    wide = tl.broadcast_to(of_blocks[:, None], (BLOCKS, CODE_BLOCK))
    return tl.reshape(wide, (BLOCKS * CODE_BLOCK,))


@triton.jit
def encoded(x, largest, chance, POSITIVE: tl.constexpr):
    """A byte for each element, from the largest magnitudes of the blocks."""
    SHIFT: tl.constexpr = 19 if POSITIVE else 20
    is_zero = largest < _SMALLEST
    one = tl.full(largest.shape, 1.0, tl.float32)
    scale = tl.where(is_zero, 0.0, tl.div_rn(one, tl.where(is_zero, 1.0, largest)))
    offset = tl.full(x.shape, _OFFSET, tl.float32)
    relative = multiply_add(x if POSITIVE else tl.abs(x), _to_elements(scale), offset)
    code = (_bits_of(relative) + (chance << (SHIFT - 16)) - _BASE) >> SHIFT
    if POSITIVE:  # a second moment of zero beside a first one would be a step without bounds
        code = tl.maximum(code, 1)
    else:
        code |= (_bits_of(x) >> 24) & 0x80
    return code.to(tl.uint8)


@triton.jit
def decoded(code, largest, POSITIVE: tl.constexpr):
    """The way back, fp32."""
    SHIFT: tl.constexpr = 19 if POSITIVE else 20
    BITS: tl.constexpr = 255 if POSITIVE else 127
    code = code.to(tl.uint32)
    relative = _number_of(((code & BITS) << SHIFT) | _BASE)
    reach = _to_elements(largest)
    x = multiply_add(relative, reach, -_OFFSET * reach)
    return x if POSITIVE else _number_of(_bits_of(x) | ((code >> 7) << 31))

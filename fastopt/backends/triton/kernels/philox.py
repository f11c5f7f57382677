"""Random numbers that are a function of a seed and a counter: core/philox.h."""

from __future__ import annotations

import triton
import triton.language as tl

# A group of 64 places of a row has its words from 16 lanes.
LANES = tl.constexpr(16)
RANDOM_GROUP = tl.constexpr(64)


@triton.jit
def _multiplied(x, FACTOR: tl.constexpr):
    """High and low word, which are one instruction so."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, seed_low, seed_high):
    """Four words of the counter (c0, c1, c2, 0)."""
    key0 = seed_low.to(tl.uint32, bitcast=True)
    key1 = seed_high.to(tl.uint32, bitcast=True)
    c3 = c0 * 0
    for _ in tl.static_range(7):
        high0, low0 = _multiplied(c0, 0xD2511F53)
        high1, low1 = _multiplied(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3

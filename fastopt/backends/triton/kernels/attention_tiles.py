"""What the attention's kernels share: where a tile lies, which keys a query sees, what a score is.

``csrc/core/attention_layer.h`` and ``attention_scores.h`` say the same for C++. Here a layer is the
``Layer`` of ``attention.py``, where None stands for what is not there. Numbers of queries and keys
come with dimensions of one for each other, so that a tile of scores may lie either way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.philox import LANES, RANDOM_GROUP, philox
from fastopt.backends.triton.kernels.precision import as_factor

LOG2_E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(float("-inf"))  # the score of a key that is not seen


@triton.jit
def clamped(x, low, high):
    """``x`` brought into [low, high]; high where that is below low."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _first_row(starts_ptr, sequence, rows):
    """Starts that leave the tensors are brought back into them."""
    return clamped(tl.load(starts_ptr + sequence), 0, rows)


@triton.jit
def place_of_tile(tile, starts_ptr, sequences, rows, PACKED: tl.constexpr, TILE: tl.constexpr):
    """The sequence of a tile, and the tile's first row in it, the last rows first.

    PACKED rows of as many heads take the place of one.
    """
    if starts_ptr is None:
        tiles = tl.cdiv(rows * PACKED, TILE)
        sequence = tile // tiles
        first = (tiles - 1 - tile % tiles) * TILE
    else:
        # A sequence is cut from its own beginning: its first tile is starts * PACKED / TILE plus
        # its number.
        sequence = tile * 0
        after = sequence + sequences
        while after - sequence > 1:
            middle = (sequence + after) // 2
            begins = _first_row(starts_ptr, middle, rows) * PACKED // TILE + middle <= tile
            sequence = tl.where(begins, middle, sequence)
            after = tl.where(begins, after, middle)
        begin = _first_row(starts_ptr, sequence, rows) * PACKED // TILE + sequence
        first = (tile - begin) * TILE
    return sequence, first


@triton.jit
def rows_of_sequence(sequence, starts_ptr, rows):
    """Where a sequence begins among the rows in memory, and how many it has."""
    if starts_ptr is None:
        return sequence * 0, sequence * 0 + rows
    else:
        first = _first_row(starts_ptr, sequence, rows)
        return first, clamped(tl.load(starts_ptr + sequence + 1), first, rows) - first


@triton.jit
def keys_of_sequence(sequence, layer, rows):
    """The same of keys, as far as they are used."""
    first, keys = rows_of_sequence(sequence, layer.key_starts, rows)
    if layer.used_keys is not None:
        keys = clamped(tl.load(layer.used_keys + sequence), 0, keys)
    return first, keys


@triton.jit
def batch_in_memory(sequence, starts_ptr):
    """Sequences behind each other lie in a batch of one."""
    if starts_ptr is None:
        return sequence.to(tl.int64)
    else:
        return sequence.to(tl.int64) * 0


@triton.jit
def diagonal_of(queries, keys, BOTTOM_RIGHT: tl.constexpr):
    """The key at no distance from query 0."""
    if BOTTOM_RIGHT:
        return keys - queries
    else:
        return keys * 0


@triton.jit
def visible(first, last, keys, diagonal, left, right):
    """The keys [begin, end) that any of the queries [first, last] see, and those that all do."""
    begin, all_begin = keys * 0, keys * 0
    end, all_end = keys, keys
    if right is not None:
        end = clamped(last + diagonal + right + 1, 0, keys)
        all_end = clamped(first + diagonal + right + 1, 0, keys)
    if left is not None:
        begin = clamped(first + diagonal - left, 0, end)
        all_begin = clamped(last + diagonal - left, 0, keys)
    return begin, end, all_begin, all_end


@triton.jit
def seeing(first, last, queries, diagonal, left, right):
    """The queries [begin, end) that see any of the keys [first, last], and those that see all."""
    begin, all_begin = queries * 0, queries * 0
    end, all_end = queries, queries
    if right is not None:
        begin = clamped(first - diagonal - right, 0, queries)
        all_begin = clamped(last - diagonal - right, 0, queries)
    if left is not None:
        end = clamped(last - diagonal + left + 1, 0, queries)
        all_end = clamped(first - diagonal + left + 1, 0, queries)
    return begin, end, all_begin, all_end


@triton.jit
def parts_of_range(begin, end, all_begin, all_end, GENERAL: tl.constexpr, TILE: tl.constexpr):
    """Where tiles begin and are whole, from where on they no longer are, and the end.

    GENERAL scores ask for registers: their loop is there once, and takes no tile for whole.
    """
    first = begin // TILE * TILE
    if GENERAL:
        return first, first, first, end
    else:
        whole = clamped(tl.cdiv(all_begin, TILE) * TILE, first, end)
        return first, whole, clamped(all_end // TILE * TILE, whole, end), end


@triton.constexpr_function
def has_part(part, general, is_bounded_before):
    """Whether the range has edges before its whole tiles (part 0), these (1), and edges (2)."""
    return part == 2 or (not general and (part == 1 or is_bounded_before))


@triton.jit
def sees(query, key, keys, diagonal, left, right):
    """Whether queries see keys, as far as there are keys and bounds."""
    seen = (key < keys) & (query == query)
    if left is not None:
        seen = seen & (key - query >= diagonal - left)
    if right is not None:
        seen = seen & (key - query <= diagonal + right)
    return seen


@triton.jit
def load_rows(
    rows_ptr, stride, first, end, TILE: tl.constexpr, FEATURES: tl.constexpr, BOUNDED: tl.constexpr
):
    """``[TILE, features]`` from row ``first`` on, zeros for rows from ``end`` on.

    FEATURES that are no power of two are filled up with zeros; fewer than 16 are no operand.
    """
    BLOCK: tl.constexpr = padded(FEATURES)
    row = tl.arange(0, TILE)[:, None]
    feature = tl.arange(0, BLOCK)[None, :]
    pointers = rows_ptr + tl.full((), first, tl.int64) * stride + (row * stride + feature)
    if BOUNDED:
        x = tl.load(pointers, mask=(first + row < end) & (feature < FEATURES), other=0.0)
    elif FEATURES < BLOCK:
        x = tl.load(pointers, mask=feature < FEATURES, other=0.0)
    else:
        x = tl.load(pointers)
    return as_factor(x)


@triton.constexpr_function
def padded(features):
    """Of a row in registers."""
    return max(16, triton.next_power_of_2(features))


@triton.jit
def saturation_of(product, layer):
    """tanh(scale * product / softcap): as the quotient of what is below 1 it never overflows."""
    x = product * (layer.scale / layer.softcap)
    magnitude = tl.abs(x)
    power = tl.exp2(magnitude * (-2 * LOG2_E))
    square = x * x
    # Taylor's series where the difference would cancel: below 0.25 the next term is under 2e-8.
    series = magnitude * (
        1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    )
    result = tl.where(magnitude < 0.25, series, (1 - power) / (1 + power))
    return tl.where(x < 0, -result, result)


@triton.jit
def score_of(product, query, key, queries, diagonal, sequence, head, layer):
    """cap(scale * product) - slope * distance + bias, NEVER where a mask says so.

    ``head`` is one for all queries, or one for each in their dimensions.
    """
    if layer.softcap is not None:
        score = saturation_of(product, layer) * layer.softcap
    else:
        score = product * layer.scale
    if layer.slopes is not None:
        slope = tl.load(layer.slopes + sequence * layer.heads + head)
        score -= tl.abs((key - query - diagonal).to(tl.float32)) * slope
    if layer.mask is not None:
        rows = sequence.to(tl.int64) * layer.mask_strides[0]
        rows += tl.cast(head, tl.int64) * layer.mask_strides[1]
        rows += query.to(tl.int64) * layer.mask_strides[2]
        # Not the sequence's own keys: of its columns the compiler knows when they are a multiple
        # of 16, and loads several at once.
        there = (query < queries) & (key < layer.mask_columns)
        mask = tl.load(layer.mask + rows + key, mask=there, other=0)
        if layer.mask.dtype.element_ty == tl.uint8:
            score = tl.where(mask != 0, score, NEVER)
        else:
            score += mask.to(tl.float32)
    return score


@triton.jit
def through_cap(product, gradient, layer):
    """The gradient of scale * product, of the one of the score."""
    if layer.softcap is not None:
        saturated = saturation_of(product, layer)
        gradient *= 1 - saturated * saturated
    return gradient


@triton.jit
def kept(
    query, head, first_key, threshold, seed_low, seed_high,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which weights dropout keeps, of a tile of queries by keys, or TRANSPOSED.

    ``head`` is counted through the batch.
    """
    GROUPS: tl.constexpr = max(KEYS // RANDOM_GROUP, 1)
    WORDS: tl.constexpr = min(KEYS // LANES, RANDOM_GROUP // LANES)
    first_key = tl.full((), first_key, tl.int32)
    lane = (tl.arange(0, GROUPS * LANES) + first_key // RANDOM_GROUP * LANES).to(tl.uint32)
    lane = lane[:, None] if TRANSPOSED else lane[None, :]
    row = query.to(tl.uint32)
    words = philox(lane, row, (head + query * 0).to(tl.uint32), seed_low, seed_high)
    limit = threshold.to(tl.uint32, bitcast=True)
    bits = (words[0] >= limit).to(tl.int32)
    for word in tl.static_range(1, 4):
        bits |= (words[word] >= limit).to(tl.int32) << word
    word = tl.arange(0, WORDS) + first_key % RANDOM_GROUP // LANES
    if TRANSPOSED:
        bits = tl.reshape(bits, (GROUPS, 1, LANES, QUERIES))
        bits = bits >> word[None, :, None, None]
        return tl.reshape(bits & 1, (KEYS, QUERIES)) != 0
    else:
        bits = tl.reshape(bits, (QUERIES, GROUPS, 1, LANES))
        bits = bits >> word[None, None, :, None]
        return tl.reshape(bits & 1, (QUERIES, KEYS)) != 0

"""FlashAttention-2's forward pass (Dao 2023), and Flash-decoding's merge of keys that were split.

A program has a tile of queries of one head; keys and values go by in tiles. Where queries are few,
those of all heads that share keys are rows of one tile (PACKED), and the keys are split.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.attention_tiles import (
    LOG2_E,
    NEVER,
    batch_in_memory,
    diagonal_of,
    has_part,
    kept,
    keys_of_sequence,
    load_rows,
    padded,
    parts_of_range,
    place_of_tile,
    rows_of_sequence,
    score_of,
    sees,
    visible,
)
from fastopt.backends.triton.kernels.precision import as_factor, rounded, store_rounded


@triton.jit
def _weights_of(scores, largest, total, factor, MAY_SEE_NOTHING: tl.constexpr):
    """Scores become weights relative to the largest score so far.

    That one has the weight 1 exactly: differences come first. ``factor`` leads from differences to
    powers of two.
    """
    higher = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(higher == NEVER, 0.0, higher) if MAY_SEE_NOTHING else higher
    shrinkage = tl.exp2((largest - base) * factor)
    weights = tl.exp2((scores - base[:, None]) * factor)
    return weights, shrinkage, higher, total * shrinkage + tl.sum(weights, 1)


@triton.jit
def _gather(
    sums, largest, total, query_tile, begin, end, key_ptr, key_stride, value_ptr, value_stride,
    query, queries, keys, diagonal, left, right, sequence, head, layer, factor, threshold,
    seed_low, seed_high, FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    GENERAL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """What a tile of queries gathers from keys in whole tiles; BOUNDED: not all are seen."""
    for first in range(begin, end, TILE_KEYS):
        key_tile = load_rows(key_ptr, key_stride, first, keys, TILE_KEYS, FEATURES, BOUNDED)
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        key = first + tl.arange(0, TILE_KEYS)[None, :]
        if GENERAL:
            scores = score_of(scores, query, key, queries, diagonal, sequence, head, layer)
        if BOUNDED:
            scores = tl.where(sees(query, key, keys, diagonal, left, right), scores, NEVER)
        weights, shrinkage, largest, total = _weights_of(
            scores, largest, total, factor, GENERAL or BOUNDED
        )
        if layer.growth is not None:
            number = sequence * layer.heads + head
            keeps = kept(
                query, number, first, threshold, seed_low, seed_high, TILE_QUERIES, TILE_KEYS, False
            )
            weights = tl.where(keeps, weights, 0.0)
        value_tile = load_rows(
            value_ptr, value_stride, first, keys, TILE_KEYS, VALUE_FEATURES, BOUNDED
        )
        weights = as_factor(rounded(weights, value_ptr.dtype.element_ty))
        sums = tl.dot(weights, value_tile, sums * shrinkage[:, None], input_precision=PRECISION)
    return sums, largest, total


@triton.jit
def _finished(sums, largest, total, sink):
    """Output and logsumexp. A query that sees no key is zeros; a sink is a key without a value."""
    if sink is not None:
        both = tl.maximum(largest, sink)
        base = tl.where(both == NEVER, 0.0, both)
        shrinkage = tl.exp2((largest - base) * LOG2_E)
        weight = tl.where(sink == base, 1.0, tl.exp2((sink - base) * LOG2_E))
        total = total * shrinkage + weight
        sums *= shrinkage[:, None]
        largest = both
    divisor = tl.where(total == 0, 1.0, total)
    logsumexp = tl.where(total == 0, NEVER, largest + tl.log(divisor))
    return sums / divisor[:, None], logsumexp


@triton.jit(do_not_specialize=["sequences", "query_rows", "key_rows", "left", "right",
                               "threshold", "seed_low", "seed_high"])  # fmt: skip
def _attention_forward_kernel(
    query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides,
    output_ptr, output_strides, logsumexp_ptr, layer,
    sequences, query_rows, key_rows, left, right, threshold, seed_low, seed_high,
    GROUP: tl.constexpr, FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    UNIT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, GENERAL: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    # Load: where the tile lies, and its queries.
    sequence, first = place_of_tile(
        tl.program_id(0), layer.query_starts, sequences, query_rows, PACKED, TILE_QUERIES
    )
    first_query, queries = rows_of_sequence(sequence, layer.query_starts, query_rows)
    first_key, keys = keys_of_sequence(sequence, layer, key_rows)
    if first >= queries * PACKED or first < 0:
        return
    batch = batch_in_memory(sequence, layer.query_starts)
    row = first + tl.arange(0, TILE_QUERIES)
    if PACKED > 1:
        key_head = tl.program_id(1)
        query, head = row // PACKED, key_head * PACKED + row % PACKED
        last = tl.minimum((first + TILE_QUERIES - 1) // PACKED, queries - 1)
        head_of_rows = head[:, None]
    else:
        query, head = row, tl.program_id(1)
        key_head = head // GROUP
        last = tl.minimum(first + TILE_QUERIES, queries) - 1
        head_of_rows = head
    there = (query < queries)[:, None]
    place = first_query + query.to(tl.int64)

    feature = tl.arange(0, padded(FEATURES))[None, :]
    rows = batch * query_strides[0] + head.to(tl.int64) * query_strides[1]
    rows = (rows + place * query_strides[2]) * UNIT
    query_tile = as_factor(
        tl.load(query_ptr + rows[:, None] + feature, mask=there & (feature < FEATURES), other=0.0)
    )
    key_ptr += (
        batch * key_strides[0] + key_head.to(tl.int64) * key_strides[1]
        + first_key.to(tl.int64) * key_strides[2]
    ) * UNIT  # fmt: skip
    value_ptr += (
        batch * value_strides[0] + key_head.to(tl.int64) * value_strides[1]
        + first_key.to(tl.int64) * value_strides[2]
    ) * UNIT  # fmt: skip

    # Compute.
    diagonal = diagonal_of(queries, keys, BOTTOM_RIGHT)
    begin, end, all_begin, all_end = visible(first // PACKED, last, keys, diagonal, left, right)
    if SPLIT:
        split, splits = tl.program_id(2), tl.num_programs(2)
        share = tl.cdiv(tl.cdiv(end - begin, splits), TILE_KEYS) * TILE_KEYS
        begin = begin // TILE_KEYS * TILE_KEYS + split * share
        end = tl.minimum(begin + share, end) if split + 1 < splits else end
    bounds = parts_of_range(begin, end, all_begin, all_end, GENERAL, TILE_KEYS)
    factor = LOG2_E if GENERAL else layer.scale * LOG2_E
    sums = tl.zeros((TILE_QUERIES, padded(VALUE_FEATURES)), tl.float32)
    largest = tl.full((TILE_QUERIES,), NEVER, tl.float32)
    total = tl.zeros((TILE_QUERIES,), tl.float32)
    for part in tl.static_range(3):
        if has_part(part, GENERAL, left is not None):
            sums, largest, total = _gather(
                sums, largest, total, query_tile, bounds[part], bounds[part + 1],
                key_ptr, key_strides[2] * UNIT, value_ptr, value_strides[2] * UNIT,
                query[:, None], queries, keys, diagonal, left, right, sequence, head_of_rows, layer,
                factor, threshold, seed_low, seed_high, FEATURES, VALUE_FEATURES,
                TILE_QUERIES, TILE_KEYS, PRECISION, GENERAL, part != 1,
            )  # fmt: skip
    if not GENERAL:
        largest *= layer.scale
    if layer.growth is not None:
        sums *= layer.growth
    sink = None
    if not SPLIT and layer.sinks is not None:
        sink = tl.load(layer.sinks + head) + tl.zeros((TILE_QUERIES,), tl.float32)
    output, logsumexp = _finished(sums, largest, total, sink)

    # Store.
    row_in_memory = (batch * layer.heads + head) * query_rows + place
    if SPLIT:
        behind = tl.program_id(2).to(tl.int64) * sequences * layer.heads * query_rows
        logsumexp_ptr += behind
        output_ptr += behind * VALUE_FEATURES
    tl.store(logsumexp_ptr + row_in_memory, logsumexp, mask=query < queries)
    rows = batch * output_strides[0] + head.to(tl.int64) * output_strides[1]
    rows = (rows + place * output_strides[2]) * UNIT
    feature = tl.arange(0, padded(VALUE_FEATURES))[None, :]
    store_rounded(output_ptr + rows[:, None] + feature, output, there & (feature < VALUE_FEATURES))


@triton.jit(do_not_specialize=["rows", "query_rows", "splits"])
def _attention_merge_kernel(
    parts_ptr, part_logsumexp_ptr, output_ptr, output_strides, logsumexp_ptr, sinks_ptr,
    rows, query_rows, heads, splits, VALUE_FEATURES: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """What was gathered from each part of the keys, in their order; rows are of all heads."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    there = row < rows
    feature = tl.arange(0, padded(VALUE_FEATURES))[None, :]
    written = there[:, None] & (feature < VALUE_FEATURES)
    sums = tl.zeros((TILE_ROWS, padded(VALUE_FEATURES)), tl.float32)
    largest = tl.full((TILE_ROWS,), NEVER, tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)
    for split in range(0, splits):
        own = split * rows.to(tl.int64) + row
        part = tl.load(parts_ptr + own[:, None] * VALUE_FEATURES + feature, mask=written, other=0.0)
        score = tl.load(part_logsumexp_ptr + own, mask=there, other=NEVER)
        weights, shrinkage, largest, total = _weights_of(
            score[:, None], largest, total, LOG2_E, True
        )
        sums = sums * shrinkage[:, None] + part * weights
    head = row // query_rows % heads
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head)
    output, logsumexp = _finished(sums, largest, total, sink)
    tl.store(logsumexp_ptr + row, logsumexp, mask=there)
    place = row // query_rows // heads * output_strides[0] + head * output_strides[1]
    place += row % query_rows * output_strides[2]
    store_rounded(output_ptr + place[:, None] + feature, output, written)

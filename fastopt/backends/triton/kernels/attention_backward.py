"""FlashAttention-2's backward pass, in which nobody adds to what somebody else writes.

Weights are made again from logsumexp. One kernel has a tile of keys and goes through the queries
of all heads that share them, products transposed, keys by queries, so that weights are operands as
they lie in registers. One has a tile of queries, and one a square of the bias.
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
    seeing,
    sees,
    through_cap,
    visible,
)
from fastopt.backends.triton.kernels.precision import as_factor, rounded, store_rounded


@triton.jit
def _differentiate(
    product, through, logsumexp, delta, query, key, queries, keys, diagonal, left, right,
    sequence, head, layer, first_key, threshold, seed_low, seed_high, TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr, GENERAL: tl.constexpr, BOUNDED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The weights that go to the values, and the gradient of the scores.

    ``product`` is that of queries and keys, ``through`` that of the output's gradient and values.
    """
    if GENERAL:
        score = score_of(product, query, key, queries, diagonal, sequence, head, layer)
    else:
        score = product * layer.scale
    # Compiled without fused additions: rounded as in the forward pass, where one key has all the
    # weight, that is 1 exactly.
    weight = tl.exp2((score - logsumexp) * LOG2_E)
    given = weight
    if layer.growth is not None:
        number = sequence * layer.heads + head
        keeps = kept(
            query, number, first_key, threshold, seed_low, seed_high, TILE_QUERIES, TILE_KEYS,
            TRANSPOSED,
        )  # fmt: skip
        given = tl.where(keeps, weight * layer.growth, 0.0)
        through = tl.where(keeps, through * layer.growth, 0.0)
    gradient = weight * (through - delta)
    if BOUNDED:
        seen = sees(query, key, keys, diagonal, left, right) & (logsumexp != -NEVER)
        given = tl.where(seen, given, 0.0)
        gradient = tl.where(seen, gradient, 0.0)
    return given, gradient


@triton.jit
def _numbers_of(logsumexp_ptr, deltas_ptr, first, end, TILE: tl.constexpr):
    """Of some queries. One that is not there, or sees no key, has weights of zero."""
    place = first + tl.arange(0, TILE)
    logsumexp = tl.load(logsumexp_ptr + place, mask=place < end, other=NEVER)
    delta = tl.load(deltas_ptr + place, mask=place < end, other=0.0)
    return tl.where(logsumexp == NEVER, -NEVER, logsumexp), delta


@triton.jit
def _add_to_keys(
    key_sums, value_sums, key_tile, value_tile, begin, end, first_key, query_ptr, query_stride,
    gradient_ptr, gradient_stride, logsumexp_ptr, deltas_ptr, queries, keys, diagonal, left, right,
    sequence, head, layer, threshold, seed_low, seed_high,
    FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr, TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr, PRECISION: tl.constexpr, GENERAL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """What the queries of some whole tiles give to a tile of keys."""
    key = first_key + tl.arange(0, TILE_KEYS)[:, None]
    for first in range(begin, end, TILE_QUERIES):
        query_tile = load_rows(
            query_ptr, query_stride, first, queries, TILE_QUERIES, FEATURES, BOUNDED
        )
        gradient_tile = load_rows(
            gradient_ptr, gradient_stride, first, queries, TILE_QUERIES, VALUE_FEATURES, BOUNDED
        )
        logsumexp, delta = _numbers_of(logsumexp_ptr, deltas_ptr, first, queries, TILE_QUERIES)
        product = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
        through = tl.dot(value_tile, tl.trans(gradient_tile), input_precision=PRECISION)
        query = first + tl.arange(0, TILE_QUERIES)[None, :]
        given, gradient = _differentiate(
            product, through, logsumexp[None, :], delta[None, :], query, key, queries, keys,
            diagonal, left, right, sequence, head, layer, first_key, threshold, seed_low, seed_high,
            TILE_QUERIES, TILE_KEYS, GENERAL, BOUNDED, True,
        )  # fmt: skip
        given = as_factor(rounded(given, query_ptr.dtype.element_ty))
        value_sums = tl.dot(given, gradient_tile, value_sums, input_precision=PRECISION)
        gradient = through_cap(product, gradient, layer)
        gradient = as_factor(rounded(gradient, query_ptr.dtype.element_ty))
        key_sums = tl.dot(gradient, query_tile, key_sums, input_precision=PRECISION)
    return key_sums, value_sums


@triton.jit(do_not_specialize=["sequences", "query_rows", "key_rows", "left", "right",
                               "threshold", "seed_low", "seed_high"])  # fmt: skip
def _attention_key_gradient_kernel(
    query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides,
    gradient_ptr, gradient_strides, logsumexp_ptr, deltas_ptr,
    key_gradient_ptr, key_gradient_strides, value_gradient_ptr, value_gradient_strides, layer,
    sequences, query_rows, key_rows, left, right, threshold, seed_low, seed_high,
    GROUP: tl.constexpr, FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr, UNIT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, GENERAL: tl.constexpr, PRECISION: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    # Load: where the tile lies, and its keys and values.
    sequence, first = place_of_tile(
        tl.program_id(0), layer.key_starts, sequences, key_rows, 1, TILE_KEYS
    )
    first_query, queries = rows_of_sequence(sequence, layer.query_starts, query_rows)
    first_key, keys = keys_of_sequence(sequence, layer, key_rows)
    if first >= keys or first < 0:
        return
    batch = batch_in_memory(sequence, layer.query_starts)
    key_head = tl.program_id(1)
    key_head_64 = key_head.to(tl.int64)
    place = first_key.to(tl.int64)
    key_ptr += (batch * key_strides[0] + key_head_64 * key_strides[1]
                + place * key_strides[2]) * UNIT  # fmt: skip
    value_ptr += (batch * value_strides[0] + key_head_64 * value_strides[1]
                  + place * value_strides[2]) * UNIT  # fmt: skip
    key_tile = load_rows(key_ptr, key_strides[2] * UNIT, first, keys, TILE_KEYS, FEATURES, True)
    value_tile = load_rows(
        value_ptr, value_strides[2] * UNIT, first, keys, TILE_KEYS, VALUE_FEATURES, True
    )

    # Compute.
    diagonal = diagonal_of(queries, keys, BOTTOM_RIGHT)
    last = tl.minimum(first + TILE_KEYS, keys) - 1
    begin, end, all_begin, all_end = seeing(first, last, queries, diagonal, left, right)
    bounds = parts_of_range(begin, end, all_begin, all_end, GENERAL, TILE_QUERIES)
    key_sums = tl.zeros((TILE_KEYS, padded(FEATURES)), tl.float32)
    value_sums = tl.zeros((TILE_KEYS, padded(VALUE_FEATURES)), tl.float32)
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        head_64 = tl.full((), head, tl.int64)
        numbers = (batch * layer.heads + head_64) * query_rows + first_query
        rows = (batch * query_strides[0] + head_64 * query_strides[1]
                + first_query.to(tl.int64) * query_strides[2]) * UNIT  # fmt: skip
        gradient_rows = (batch * gradient_strides[0] + head_64 * gradient_strides[1]
                         + first_query.to(tl.int64) * gradient_strides[2]) * UNIT  # fmt: skip
        for part in tl.static_range(3):
            if has_part(part, GENERAL, right is not None):
                key_sums, value_sums = _add_to_keys(
                    key_sums, value_sums, key_tile, value_tile, bounds[part], bounds[part + 1],
                    first, query_ptr + rows, query_strides[2] * UNIT,
                    gradient_ptr + gradient_rows, gradient_strides[2] * UNIT,
                    logsumexp_ptr + numbers, deltas_ptr + numbers, queries, keys, diagonal, left,
                    right, sequence, head, layer, threshold, seed_low, seed_high, FEATURES,
                    VALUE_FEATURES, TILE_QUERIES, TILE_KEYS, PRECISION, GENERAL, part != 1,
                )  # fmt: skip

    # Store.
    _store_gradient(
        key_gradient_ptr, key_gradient_strides, batch, key_head_64, first_key, first, keys,
        key_sums * layer.scale, UNIT, FEATURES, TILE_KEYS,
    )  # fmt: skip
    _store_gradient(
        value_gradient_ptr, value_gradient_strides, batch, key_head_64, first_key, first, keys,
        value_sums, UNIT, VALUE_FEATURES, TILE_KEYS,
    )  # fmt: skip


@triton.jit
def _store_gradient(
    gradient_ptr, strides, batch, head, first_row, first, end, sums,
    UNIT: tl.constexpr, FEATURES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, TILE)[:, None]
    feature = tl.arange(0, padded(FEATURES))[None, :]
    rows = batch * strides[0] + head * strides[1] + (first_row + row.to(tl.int64)) * strides[2]
    store_rounded(gradient_ptr + rows * UNIT + feature, sums, (row < end) & (feature < FEATURES))


@triton.jit
def _load_queries(
    query_ptr, query_strides, gradient_ptr, gradient_strides, logsumexp_ptr, deltas_ptr,
    batch, head, heads, first_query, first, queries, query_rows,
    UNIT: tl.constexpr, FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of queries, of the output's gradient, and their numbers."""
    place = first_query.to(tl.int64)
    rows = batch * query_strides[0] + head * query_strides[1] + place * query_strides[2]
    query_tile = load_rows(
        query_ptr + rows * UNIT, query_strides[2] * UNIT, first, queries, TILE, FEATURES, True
    )
    rows = batch * gradient_strides[0] + head * gradient_strides[1] + place * gradient_strides[2]
    gradient_tile = load_rows(
        gradient_ptr + rows * UNIT, gradient_strides[2] * UNIT, first, queries, TILE,
        VALUE_FEATURES, True,
    )  # fmt: skip
    numbers = (batch * heads + head) * query_rows + first_query
    logsumexp, delta = _numbers_of(
        logsumexp_ptr + numbers, deltas_ptr + numbers, first, queries, TILE
    )
    return query_tile, gradient_tile, logsumexp[:, None], delta[:, None]


@triton.jit
def _add_to_queries(
    sums, query_tile, gradient_tile, logsumexp, delta, begin, end, key_ptr, key_stride, value_ptr,
    value_stride, query, queries, keys, diagonal, left, right, sequence, head, layer, threshold,
    seed_low, seed_high, FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    GENERAL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """What the keys of some whole tiles give to a tile of queries."""
    for first in range(begin, end, TILE_KEYS):
        key_tile = load_rows(key_ptr, key_stride, first, keys, TILE_KEYS, FEATURES, BOUNDED)
        value_tile = load_rows(
            value_ptr, value_stride, first, keys, TILE_KEYS, VALUE_FEATURES, BOUNDED
        )
        product = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        through = tl.dot(gradient_tile, tl.trans(value_tile), input_precision=PRECISION)
        key = first + tl.arange(0, TILE_KEYS)[None, :]
        gradient = _differentiate(
            product, through, logsumexp, delta, query, key, queries, keys, diagonal, left, right,
            sequence, head, layer, first, threshold, seed_low, seed_high, TILE_QUERIES, TILE_KEYS,
            GENERAL, BOUNDED, False,
        )[1]  # fmt: skip
        gradient = through_cap(product, gradient, layer)
        gradient = as_factor(rounded(gradient, key_ptr.dtype.element_ty))
        sums = tl.dot(gradient, key_tile, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["sequences", "query_rows", "key_rows", "left", "right",
                               "threshold", "seed_low", "seed_high"])  # fmt: skip
def _attention_query_gradient_kernel(
    query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides,
    gradient_ptr, gradient_strides, logsumexp_ptr, deltas_ptr,
    query_gradient_ptr, query_gradient_strides, layer,
    sequences, query_rows, key_rows, left, right, threshold, seed_low, seed_high,
    GROUP: tl.constexpr, FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr, UNIT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, GENERAL: tl.constexpr, PRECISION: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    # Load: where the tile lies, and its queries.
    sequence, first = place_of_tile(
        tl.program_id(0), layer.query_starts, sequences, query_rows, 1, TILE_QUERIES
    )
    first_query, queries = rows_of_sequence(sequence, layer.query_starts, query_rows)
    first_key, keys = keys_of_sequence(sequence, layer, key_rows)
    if first >= queries or first < 0:
        return
    batch = batch_in_memory(sequence, layer.query_starts)
    head = tl.program_id(1)
    key_head_64 = (head // GROUP).to(tl.int64)
    place = first_key.to(tl.int64)
    query_tile, gradient_tile, logsumexp, delta = _load_queries(
        query_ptr, query_strides, gradient_ptr, gradient_strides, logsumexp_ptr, deltas_ptr,
        batch, head.to(tl.int64), layer.heads, first_query, first, queries, query_rows,
        UNIT, FEATURES, VALUE_FEATURES, TILE_QUERIES,
    )  # fmt: skip
    key_ptr += (batch * key_strides[0] + key_head_64 * key_strides[1]
                + place * key_strides[2]) * UNIT  # fmt: skip
    value_ptr += (batch * value_strides[0] + key_head_64 * value_strides[1]
                  + place * value_strides[2]) * UNIT  # fmt: skip

    # Compute.
    diagonal = diagonal_of(queries, keys, BOTTOM_RIGHT)
    last = tl.minimum(first + TILE_QUERIES, queries) - 1
    begin, end, all_begin, all_end = visible(first, last, keys, diagonal, left, right)
    bounds = parts_of_range(begin, end, all_begin, all_end, GENERAL, TILE_KEYS)
    query = first + tl.arange(0, TILE_QUERIES)[:, None]
    sums = tl.zeros((TILE_QUERIES, padded(FEATURES)), tl.float32)
    for part in tl.static_range(3):
        if has_part(part, GENERAL, left is not None):
            sums = _add_to_queries(
                sums, query_tile, gradient_tile, logsumexp, delta, bounds[part], bounds[part + 1],
                key_ptr, key_strides[2] * UNIT, value_ptr, value_strides[2] * UNIT,
                query, queries, keys, diagonal, left, right, sequence, head, layer,
                threshold, seed_low, seed_high, FEATURES, VALUE_FEATURES,
                TILE_QUERIES, TILE_KEYS, PRECISION, GENERAL, part != 1,
            )  # fmt: skip

    # Store.
    _store_gradient(
        query_gradient_ptr, query_gradient_strides, batch, head.to(tl.int64), first_query, first,
        queries, sums * layer.scale, UNIT, FEATURES, TILE_QUERIES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sequences", "query_rows", "key_rows", "left", "right",
                               "threshold", "seed_low", "seed_high", "batches",
                               "bias_heads"])  # fmt: skip
def _attention_bias_gradient_kernel(
    query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides,
    gradient_ptr, gradient_strides, logsumexp_ptr, deltas_ptr, bias_gradient_ptr, layer,
    sequences, query_rows, key_rows, left, right, threshold, seed_low, seed_high,
    batches, bias_heads, GROUP: tl.constexpr, FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    UNIT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """A program has a square of the bias, and goes through the batches and heads that share it."""
    columns, lines = tl.cdiv(key_rows, TILE_KEYS), tl.cdiv(query_rows, TILE_QUERIES)
    first = tl.program_id(0) // columns % lines * TILE_QUERIES
    first_column = tl.program_id(0) % columns * TILE_KEYS
    part = tl.program_id(0) // columns // lines
    batch_begin, head_begin = part // bias_heads, part % bias_heads
    batch_end = tl.where(batches == 1, sequences, batch_begin + 1)
    head_end = tl.where(bias_heads == 1, layer.heads, head_begin + 1)
    query = first + tl.arange(0, TILE_QUERIES)[:, None]
    key = first_column + tl.arange(0, TILE_KEYS)[None, :]
    last = tl.minimum(first + TILE_QUERIES, query_rows) - 1
    sums = tl.zeros((TILE_QUERIES, TILE_KEYS), tl.float32)
    for number in range(batch_begin, batch_end):
        sequence = tl.full((), number, tl.int32)
        keys = keys_of_sequence(sequence, layer, key_rows)[1]
        diagonal = diagonal_of(query_rows, keys, BOTTOM_RIGHT)
        begin, end = visible(first, last, keys, diagonal, left, right)[:2]
        batch = sequence.to(tl.int64)
        if (first_column < end) & (first_column + TILE_KEYS > begin):
            for head in range(head_begin, head_end):
                head_64 = tl.full((), head, tl.int64)
                query_tile, gradient_tile, logsumexp, delta = _load_queries(
                    query_ptr, query_strides, gradient_ptr, gradient_strides,
                    logsumexp_ptr, deltas_ptr, batch, head_64, layer.heads, sequence * 0, first,
                    query_rows, query_rows, UNIT, FEATURES, VALUE_FEATURES, TILE_QUERIES,
                )  # fmt: skip
                rows = batch * key_strides[0] + head_64 // GROUP * key_strides[1]
                key_tile = load_rows(
                    key_ptr + rows * UNIT, key_strides[2] * UNIT, first_column, keys, TILE_KEYS,
                    FEATURES, True,
                )  # fmt: skip
                rows = batch * value_strides[0] + head_64 // GROUP * value_strides[1]
                value_tile = load_rows(
                    value_ptr + rows * UNIT, value_strides[2] * UNIT, first_column, keys, TILE_KEYS,
                    VALUE_FEATURES, True,
                )  # fmt: skip
                product = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
                through = tl.dot(gradient_tile, tl.trans(value_tile), input_precision=PRECISION)
                gradient = _differentiate(
                    product, through, logsumexp, delta, query, key, query_rows, keys, diagonal,
                    left, right, sequence, head, layer, first_column, threshold, seed_low,
                    seed_high, TILE_QUERIES, TILE_KEYS, True, True, False,
                )[1]  # fmt: skip
                sums += gradient
    rows = (part.to(tl.int64) * query_rows + query) * key_rows
    tl.store(bias_gradient_ptr + rows + key, sums, mask=(query < query_rows) & (key < key_rows))


@triton.jit(do_not_specialize=["rows", "query_rows"])
def _attention_delta_kernel(
    output_ptr, output_strides, gradient_ptr, gradient_strides, deltas_ptr, rows, query_rows, heads,
    VALUE_FEATURES: tl.constexpr, UNIT: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Outputs times their gradients, by rows of all heads."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    batch, head, query = row // query_rows // heads, row // query_rows % heads, row % query_rows
    feature = tl.arange(0, padded(VALUE_FEATURES))[None, :]
    there = (row < rows)[:, None] & (feature < VALUE_FEATURES)
    place = batch * output_strides[0] + head * output_strides[1] + query * output_strides[2]
    output = tl.load(output_ptr + place[:, None] * UNIT + feature, mask=there, other=0.0)
    place = batch * gradient_strides[0] + head * gradient_strides[1] + query * gradient_strides[2]
    gradient = tl.load(gradient_ptr + place[:, None] * UNIT + feature, mask=there, other=0.0)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(deltas_ptr + row, delta, mask=row < rows)

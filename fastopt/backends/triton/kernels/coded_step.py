"""The step of state that is not stored in its parameter's dtype, see ``state_codes.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels import state_codes as codes
from fastopt.backends.triton.kernels import tasks
from fastopt.backends.triton.kernels.precision import rounded, store_rounded


@triton.jit
def _step_of(record_ptr, task_ptr):
    """The number of a task's step, which the card has counted or the host."""
    address = tl.load(task_ptr + tasks.STEP_COUNTER)
    is_double = tl.load((task_ptr + tasks.STEP_COUNTER + 1).to(tl.pointer_type(tl.int32))) == 1
    wide = tl.load(
        address.to(tl.pointer_type(tl.float64)), mask=(address != 0) & is_double, other=0.0
    )
    narrow = tl.load(
        address.to(tl.pointer_type(tl.float32)), mask=(address != 0) & ~is_double, other=0.0
    )
    return tl.where(address == 0, tasks.real_at(record_ptr + tasks.STEP), wide + narrow).to(
        tl.int64
    )


@triton.jit
def _step_coded_elements(
    functor, tail, task_ptr, words, first, step_end, average_end, params, grads, averages, slots,
    remainders, UPDATE: tl.constexpr, POSITIVE: tl.constexpr, CODE: tl.constexpr,
    PARAM_CODE: tl.constexpr,
):  # fmt: skip
    """As in ``optimizer_step.py``, of whole blocks from ``first`` on, as far as they are there.

    POSITIVE has a bit for each slot that is never negative.
    """
    STORED: tl.constexpr = params.dtype.element_ty
    TILE: tl.constexpr = params.shape[0]
    element = first + tl.arange(0, TILE)
    steps = element < step_end
    moves = element < average_end
    writes_grad = element < tl.where(tasks.writes_gradients(tail), step_end, 0)
    coding_ptr = tl.load(task_ptr + tasks.CODING).to(tl.pointer_type(tl.int64))
    block = first // codes.CODE_BLOCK + tl.arange(0, TILE // codes.CODE_BLOCK)
    is_block = block * codes.CODE_BLOCK < step_end

    stored = tasks.loaded(params, steps | moves)
    grad = tasks.loaded(grads, steps)
    average = tasks.loaded(averages, moves)
    param = stored
    if PARAM_CODE == codes.KAHAN:
        param = codes.with_kahan_remainder(stored, tasks.loaded(remainders, steps))
    elif PARAM_CODE == codes.MASTER:
        param = codes.with_master_remainder(stored, tl.load(remainders, mask=steps, other=0))
    state = ()
    for s in tl.static_range(len(slots)):
        if CODE == codes.BLOCKWISE8:
            largest_ptrs = tasks.dense_at(
                tl.load(coding_ptr + tasks.LARGEST + s), block, tl.float32
            )
            largest = tl.load(largest_ptrs, mask=is_block, other=0.0)
            code = tl.load(slots[s], mask=steps, other=0)
            state = state + (codes.decoded(code, largest, (POSITIVE >> s) & 1 == 1),)
        else:
            state = state + (tasks.loaded(slots[s], steps),)

    grad, updated = tasks.updated(functor, tail, param, grad, state, STORED, UPDATE)
    param = updated[0]
    if PARAM_CODE == codes.STOCHASTIC:
        nearest = codes.near(param, codes.param_chances(words, first, TILE))
    elif PARAM_CODE == codes.KAHAN:
        nearest = codes.near(param, 0x8000)
        store_rounded(remainders, codes.near(param - nearest, 0x8000), steps)
    elif PARAM_CODE == codes.MASTER:
        nearest = codes.near(param, 0x8000)
        tl.store(remainders, codes.master_remainder(param, nearest), mask=steps)
    else:
        nearest = rounded(param, STORED).to(param.dtype)
    stored = tl.where(steps, nearest, stored)
    store_rounded(params, stored, steps)
    store_rounded(grads, grad, writes_grad)
    store_rounded(averages, tasks.averaged(tail, average, stored), moves)
    if CODE >= codes.BFLOAT16:
        chances = codes.state_chances(words, TILE)
    for s in tl.static_range(len(slots)):
        if CODE == codes.BLOCKWISE8:
            largest = codes.largest_of_blocks(updated[1 + s], steps)
            largest_ptrs = tasks.dense_at(
                tl.load(coding_ptr + tasks.LARGEST + s), block, tl.float32
            )
            tl.store(largest_ptrs, largest, mask=is_block)
            code = codes.encoded(updated[1 + s], largest, chances, (POSITIVE >> s) & 1 == 1)
            tl.store(slots[s], code, mask=steps)
        elif CODE == codes.BFLOAT16:
            store_rounded(slots[s], codes.near(updated[1 + s], chances), steps)
        else:
            tl.store(slots[s], updated[1 + s], mask=steps)


@triton.jit(do_not_specialize=["place"])
def _coded_step_kernel(
    records_ptr, place, UPDATE: tl.constexpr, LAYOUT: tl.constexpr, SLOTS: tl.constexpr,
    POSITIVE: tl.constexpr, CODE: tl.constexpr, PARAM_CODE: tl.constexpr, STORED: tl.constexpr,
    SLOT_STORED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Steps a chunk: whole tiles as far as that goes, the rest by fewer elements.

    The parameter is dense and its state lies as it does; the gradient may lie otherwise.
    """
    record_ptr = records_ptr + place
    is_skipped = tasks.is_skipped(record_ptr)
    chunk = tasks.chunk_of_step(record_ptr, CHUNK, SLOTS)
    task, task_ptr, start, end, addresses, has_grad, moves = chunk
    param, grad, average, slots = addresses
    walk = tl.load(task_ptr + tasks.WALK)
    coding_ptr = tl.load(task_ptr + tasks.CODING).to(tl.pointer_type(tl.int64))
    remainder = tl.load(coding_ptr + tasks.REMAINDER)
    REMAINDER_STORED: tl.constexpr = tl.uint16 if PARAM_CODE == codes.MASTER else tl.bfloat16
    tail = tasks.tail_of(record_ptr, STORED)
    if is_skipped:
        tasks.zero_gradients(
            record_ptr, grad, walk, start, tl.where(has_grad, end, start), STORED, ELEMENTS
        )
    elif has_grad | moves:
        functor = tasks.functor_of(record_ptr, task, STORED, LAYOUT)
        group = start // codes.ELEMENTS_OF_GROUP
        step = _step_of(record_ptr, task_ptr)
        seed = tl.load(coding_ptr + tasks.SEED)
        words = codes.drawn(seed, tl.load(coding_ptr + tasks.NUMBER), step, group)
        alignment = param | grad | average | remainder
        for s in tl.static_range(SLOTS):
            alignment |= slots[s]
        is_wide = (walk == 0) & (alignment % 16 == 0)
        wide_end = start + tl.where(is_wide, (end - start) // TILE, 0) * TILE
        for first in range(start, wide_end, TILE):
            element = first + tl.arange(0, TILE)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (tasks.aligned_at(slots[s], SLOT_STORED) + element,)
            _step_coded_elements(
                functor, tail, task_ptr, words, first, tl.where(has_grad, wide_end, 0),
                tl.where(moves, wide_end, 0), tasks.aligned_at(param, STORED) + element,
                tasks.aligned_at(grad, STORED) + element,
                tasks.aligned_at(average, STORED) + element, at,
                tasks.aligned_at(remainder, REMAINDER_STORED) + element,
                UPDATE, POSITIVE, CODE, PARAM_CODE,
            )  # fmt: skip
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (tasks.dense_at(slots[s], element, SLOT_STORED),)
            _step_coded_elements(
                functor, tail, task_ptr, words, first, tl.where(has_grad, end, 0),
                tl.where(moves, end, 0), tasks.dense_at(param, element, STORED),
                tasks.elements_at(grad, walk, tasks.GRAD, element, STORED),
                tasks.elements_at(average, walk, tasks.AVERAGE, element, STORED), at,
                tasks.dense_at(remainder, element, REMAINDER_STORED),
                UPDATE, POSITIVE, CODE, PARAM_CODE,
            )  # fmt: skip

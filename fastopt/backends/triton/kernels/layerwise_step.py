"""The pass before the step of rules that hang on the whole parameter.

The squares of each chunk's parameters and directions, two doubles a chunk; then a program for each
parameter adds them up in a fixed order and multiplies its functor's step size, the first word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels import tasks


@triton.jit
def _squares(
    functor, tail, element, end, params, grads, slots, DIRECTION: tl.constexpr, SLOTS: tl.constexpr
):
    """Sums over the elements before the end, with gradients as the step will see them."""
    STORED: tl.constexpr = params.dtype.element_ty
    is_there = element < end
    param = tasks.loaded(params, is_there)
    grad = tasks.loaded(grads, is_there)
    state = ()
    for s in tl.static_range(SLOTS):
        state = state + (tasks.loaded(slots[s], is_there),)

    _, param, ascent = tasks.ascended(tail, param, grad, STORED)
    directions = DIRECTION(functor, param, ascent, state)
    direction = tl.where(is_there, directions[0], 0.0).to(tl.float64)
    param = param.to(tl.float64)
    return tl.sum(param * param, 0), tl.sum(direction * direction, 0)


@triton.jit(do_not_specialize=["place"])
def _measure_squares_kernel(
    records_ptr, place, squares_ptr, DIRECTION: tl.constexpr, LAYOUT: tl.constexpr,
    SLOTS: tl.constexpr, STORED: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The squares of a chunk: 16 bytes at a time as far as that goes, then by elements."""
    record_ptr = records_ptr + place
    task, task_ptr, start, end, addresses, has_grad, _ = tasks.chunk_of_step(
        record_ptr, CHUNK, SLOTS
    )
    param, grad, _, slots = addresses
    if has_grad & (tasks.is_skipped(record_ptr) == 0):
        walk = tl.load(task_ptr + tasks.WALK)
        alignment = param | grad
        for s in tl.static_range(SLOTS):
            alignment |= slots[s]
        tail = tasks.tail_of(record_ptr, STORED)
        functor_address = tl.load(record_ptr + tasks.FUNCTORS) + task * tasks.FUNCTOR_BYTES
        functor = tasks.read_functor(tasks.scalars_at(functor_address, STORED), LAYOUT)

        param_sum = tl.full((), 0.0, tl.float64)
        direction_sum = tl.full((), 0.0, tl.float64)
        wide_end = tasks.wide_end(start, end, (walk == 0) & (alignment % 16 == 0), STORED)
        for first in range(start, wide_end, WIDE):
            element = first + tl.arange(0, WIDE)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (tasks.aligned_at(slots[s], STORED) + element,)
            of_params, of_directions = _squares(
                functor, tail, element, wide_end, tasks.aligned_at(param, STORED) + element,
                tasks.aligned_at(grad, STORED) + element, at, DIRECTION, SLOTS,
            )  # fmt: skip
            param_sum += of_params
            direction_sum += of_directions
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (
                    tasks.elements_at(slots[s], walk, tasks.FIRST_SLOT + s, element, STORED),
                )
            of_params, of_directions = _squares(
                functor, tail, element, end,
                tasks.elements_at(param, walk, tasks.PARAM, element, STORED),
                tasks.elements_at(grad, walk, tasks.GRAD, element, STORED), at, DIRECTION, SLOTS,
            )  # fmt: skip
            param_sum += of_params
            direction_sum += of_directions
        chunk = tl.load(record_ptr + tasks.FIRST_CHUNK) + tl.program_id(0)
        tl.store(squares_ptr + 2 * chunk, param_sum)
        tl.store(squares_ptr + 2 * chunk + 1, direction_sum)


@triton.jit(do_not_specialize=["place"])
def _fold_squares_kernel(
    records_ptr, place, squares_ptr, STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up the chunks of one task."""
    record_ptr = records_ptr + place
    grad = tl.load(record_ptr + tasks.GRADS + tl.program_id(0))
    has_grad = (grad != 0) & (grad != tasks.LEAVE_ALONE)
    if has_grad & (tasks.is_skipped(record_ptr) == 0):
        task = tl.load(record_ptr + tasks.BEGIN) + tl.program_id(0)
        task_ptr = (
            tl.load(record_ptr + tasks.TASKS).to(tl.pointer_type(tl.int64))
            + task * tasks.TASK_WORDS
        )
        chunks = (tl.load(task_ptr + tasks.NUMEL) + CHUNK - 1) // CHUNK
        first_ptr = squares_ptr + 2 * tl.load(task_ptr + tasks.TASK_FIRST_CHUNK)
        param = tl.zeros([BLOCK], tl.float64)
        direction = tl.zeros([BLOCK], tl.float64)
        for start in range(0, chunks, BLOCK):
            chunk = start + tl.arange(0, BLOCK)
            param += tl.load(first_ptr + 2 * chunk, mask=chunk < chunks, other=0.0)
            direction += tl.load(first_ptr + 2 * chunk + 1, mask=chunk < chunks, other=0.0)
        param_sum = tl.sum(param, 0)
        direction_sum = tl.sum(direction, 0)
        if (param_sum != 0) & (direction_sum != 0):
            functor_address = tl.load(record_ptr + tasks.FUNCTORS) + task * tasks.FUNCTOR_BYTES
            functor_ptr = tasks.scalars_at(functor_address, STORED)
            step_size = tl.load(functor_ptr).to(tl.float64) * tl.sqrt(param_sum / direction_sum)
            tl.store(functor_ptr, tasks.narrowed(step_size, STORED))

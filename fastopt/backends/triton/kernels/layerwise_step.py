"""The pass before the step of rules that hang on the whole parameter.

The squares of each chunk's parameters and directions, two doubles a chunk; then a program for each
parameter adds them up in a fixed order and multiplies its functor's step size, the first word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.optimizer_step import (
    BEGIN,
    FIRST_CHUNK,
    FIRST_SLOT,
    FUNCTOR_BYTES,
    FUNCTORS,
    GRAD,
    GRADS,
    LEAVE_ALONE,
    NUMEL,
    PARAM,
    TASK_FIRST_CHUNK,
    TASK_WORDS,
    TASKS,
    WALK,
    _aligned,
    _at,
    _clamp,
    _find_share,
    _functor,
    _is_skipped,
    _loaded,
    _narrowed,
    _scalars,
    _tail,
    _wide_end,
)
from fastopt.backends.triton.kernels.precision import rounded


@triton.jit
def _squares(
    functor, tail, element, end, params, grads, slots, DIRECTION: tl.constexpr, SLOTS: tl.constexpr
):
    """Sums over the elements before the end, with gradients as the step will see them."""
    STORED: tl.constexpr = params.dtype.element_ty
    is_l2, maximize, changes_gradients, _, decay, scale, clip_value, _, _ = tail
    is_there = element < end
    param = _loaded(params, is_there)
    grad = _loaded(grads, is_there)
    state = ()
    for s in tl.static_range(SLOTS):
        state = state + (_loaded(slots[s], is_there),)

    scaled = rounded(_clamp(scale * grad, clip_value), STORED).to(grad.dtype)
    grad = tl.where(changes_gradients, scaled, grad)
    ascent = tl.where(maximize, -grad, grad)
    ascent = tl.where(is_l2, ascent + decay * param, ascent)
    param = tl.where(is_l2, param, decay * param)
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
    task, task_ptr, grad, start, end = _find_share(record_ptr, CHUNK)
    has_grad = (grad != 0) & (grad != LEAVE_ALONE)
    if has_grad & (_is_skipped(record_ptr) == 0):
        walk = tl.load(task_ptr + WALK)
        param = tl.load(task_ptr + PARAM)
        addresses = param | grad
        slots = ()
        for s in tl.static_range(SLOTS):
            slots = slots + (tl.load(task_ptr + FIRST_SLOT + s),)
            addresses |= slots[s]
        tail = _tail(record_ptr, STORED)
        functor_address = tl.load(record_ptr + FUNCTORS) + task * FUNCTOR_BYTES
        functor = _functor(_scalars(functor_address, STORED), LAYOUT)

        param_sum = tl.full((), 0.0, tl.float64)
        direction_sum = tl.full((), 0.0, tl.float64)
        wide_end = _wide_end(start, end, (walk == 0) & (addresses % 16 == 0), STORED)
        for first in range(start, wide_end, WIDE):
            element = first + tl.arange(0, WIDE)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (_aligned(slots[s], STORED) + element,)
            of_params, of_directions = _squares(
                functor, tail, element, wide_end, _aligned(param, STORED) + element,
                _aligned(grad, STORED) + element, at, DIRECTION, SLOTS,
            )  # fmt: skip
            param_sum += of_params
            direction_sum += of_directions
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (_at(slots[s], walk, FIRST_SLOT + s, element, STORED),)
            of_params, of_directions = _squares(
                functor, tail, element, end, _at(param, walk, PARAM, element, STORED),
                _at(grad, walk, GRAD, element, STORED), at, DIRECTION, SLOTS,
            )  # fmt: skip
            param_sum += of_params
            direction_sum += of_directions
        chunk = tl.load(record_ptr + FIRST_CHUNK) + tl.program_id(0)
        tl.store(squares_ptr + 2 * chunk, param_sum)
        tl.store(squares_ptr + 2 * chunk + 1, direction_sum)


@triton.jit(do_not_specialize=["place"])
def _fold_squares_kernel(
    records_ptr, place, squares_ptr, STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up the chunks of one task."""
    record_ptr = records_ptr + place
    grad = tl.load(record_ptr + GRADS + tl.program_id(0))
    has_grad = (grad != 0) & (grad != LEAVE_ALONE)
    if has_grad & (_is_skipped(record_ptr) == 0):
        task = tl.load(record_ptr + BEGIN) + tl.program_id(0)
        task_ptr = tl.load(record_ptr + TASKS).to(tl.pointer_type(tl.int64)) + task * TASK_WORDS
        chunks = (tl.load(task_ptr + NUMEL) + CHUNK - 1) // CHUNK
        first_ptr = squares_ptr + 2 * tl.load(task_ptr + TASK_FIRST_CHUNK)
        param = tl.zeros([BLOCK], tl.float64)
        direction = tl.zeros([BLOCK], tl.float64)
        for start in range(0, chunks, BLOCK):
            chunk = start + tl.arange(0, BLOCK)
            param += tl.load(first_ptr + 2 * chunk, mask=chunk < chunks, other=0.0)
            direction += tl.load(first_ptr + 2 * chunk + 1, mask=chunk < chunks, other=0.0)
        param_sum = tl.sum(param, 0)
        direction_sum = tl.sum(direction, 0)
        if (param_sum != 0) & (direction_sum != 0):
            functor_address = tl.load(record_ptr + FUNCTORS) + task * FUNCTOR_BYTES
            functor_ptr = _scalars(functor_address, STORED)
            step_size = tl.load(functor_ptr).to(tl.float64) * tl.sqrt(param_sum / direction_sum)
            tl.store(functor_ptr, _narrowed(step_size, STORED))

"""One loop for every optimizer: a program takes a chunk of a tensor.

``tasks.py`` reads what a launch is given. The update rule (``update_rules.py``) is a function among
the kernels' constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels import tasks
from fastopt.backends.triton.kernels.precision import rounded, store_rounded


@triton.jit
def _step_elements(
    functor, tail, element, step_end, average_end, params, grads, averages, slots,
    UPDATE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The update of elements, and what surrounds it; the ends are 0 where there is none of it.

    In the interpreter, masks that are scalars do not mix with others.
    """
    STORED: tl.constexpr = params.dtype.element_ty
    steps = element < step_end
    moves = element < average_end
    writes_grad = element < tl.where(tasks.writes_gradients(tail), step_end, 0)
    param = tasks.loaded(params, steps | moves)
    grad = tasks.loaded(grads, steps)
    average = tasks.loaded(averages, moves)
    state = ()
    for s in tl.static_range(SLOTS):
        state = state + (tasks.loaded(slots[s], steps),)

    grad, updated = tasks.updated(functor, tail, param, grad, state, STORED, UPDATE)
    param = tl.where(steps, rounded(updated[0], STORED).to(param.dtype), param)
    average = tasks.averaged(tail, average, param)

    store_rounded(params, param, steps)
    store_rounded(grads, grad, writes_grad)
    store_rounded(averages, average, moves)
    for s in tl.static_range(SLOTS):
        store_rounded(slots[s], updated[1 + s], steps)


@triton.jit(do_not_specialize=["place"])
def _optimizer_step_kernel(
    records_ptr, place, UPDATE: tl.constexpr, LAYOUT: tl.constexpr, SLOTS: tl.constexpr,
    STORED: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Steps a chunk: 16 bytes at a time as far as that goes, the rest element by element."""
    record_ptr = records_ptr + place
    is_skipped = tasks.is_skipped(record_ptr)
    chunk = tasks.chunk_of_step(record_ptr, CHUNK, SLOTS)
    task, task_ptr, start, end, addresses, has_grad, moves = chunk
    param, grad, average, slots = addresses
    walk = tl.load(task_ptr + tasks.WALK)
    tail = tasks.tail_of(record_ptr, STORED)
    if is_skipped:
        tasks.zero_gradients(
            record_ptr, grad, walk, start, tl.where(has_grad, end, start), STORED, ELEMENTS
        )
    elif has_grad | moves:
        functor = tasks.functor_of(record_ptr, task, STORED, LAYOUT)
        alignment = param | grad | average
        for s in tl.static_range(SLOTS):
            alignment |= slots[s]
        wide_end = tasks.wide_end(start, end, (walk == 0) & (alignment % 16 == 0), STORED)
        for first in range(start, wide_end, WIDE):
            element = first + tl.arange(0, WIDE)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (tasks.aligned_at(slots[s], STORED) + element,)
            _step_elements(
                functor, tail, element, tl.where(has_grad, wide_end, 0),
                tl.where(moves, wide_end, 0), tasks.aligned_at(param, STORED) + element,
                tasks.aligned_at(grad, STORED) + element,
                tasks.aligned_at(average, STORED) + element, at, UPDATE, SLOTS,
            )  # fmt: skip
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (
                    tasks.elements_at(slots[s], walk, tasks.FIRST_SLOT + s, element, STORED),
                )
            _step_elements(
                functor, tail, element, tl.where(has_grad, end, 0), tl.where(moves, end, 0),
                tasks.elements_at(param, walk, tasks.PARAM, element, STORED),
                tasks.elements_at(grad, walk, tasks.GRAD, element, STORED),
                tasks.elements_at(average, walk, tasks.AVERAGE, element, STORED), at, UPDATE, SLOTS,
            )  # fmt: skip


@triton.jit
def _advance_as(address, factor, summand, mask, STORED: tl.constexpr):
    """The new number: the old * factor + summand, rounded to its type."""
    pointers = address.to(tl.pointer_type(STORED))
    number = tasks.loaded(pointers, mask)
    advanced = rounded(number * factor.to(number.dtype) + summand, STORED).to(number.dtype)
    store_rounded(pointers, advanced, mask)
    return advanced.to(tl.float64)


@triton.jit
def _advance(counter_ptrs, known, factor, summand, mask):
    """As core/counter.h does; the new number, or what the host knew where there is no counter."""
    address = tl.load(counter_ptrs, mask=mask, other=0)
    dtype = tl.load((counter_ptrs + 1).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
    is_there = address != 0
    fp32 = _advance_as(address, factor, summand, is_there & (dtype == 0), tl.float32)
    fp64 = _advance_as(address, factor, summand, is_there & (dtype == 1), tl.float64)
    bf16 = _advance_as(address, factor, summand, is_there & (dtype == 2), tl.bfloat16)
    fp16 = _advance_as(address, factor, summand, is_there & (dtype == 3), tl.float16)
    narrow = tl.where(dtype == 2, bf16, tl.where(dtype == 3, fp16, fp32))
    return tl.where(is_there, tl.where(dtype == 1, fp64, narrow), known)


@triton.jit(do_not_specialize=["place"])
def _advance_steps_kernel(
    records_ptr, place, FOLD: tl.constexpr, FACTOR: tl.constexpr, LAYOUT: tl.constexpr,
    HYPERPARAMETER_COUNT: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the step of each task that has a gradient and folds its scalars into its functor."""
    record_ptr = records_ptr + place
    begin = tl.load(record_ptr + tasks.BEGIN)
    task = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_task = task < tl.where(tasks.is_skipped(record_ptr), begin, tl.load(record_ptr + tasks.END))
    grad = tl.load(record_ptr + tasks.GRADS + task - begin, mask=is_task, other=0)
    steps = (grad != 0) & (grad != tasks.LEAVE_ALONE)
    hyperparameters = ()
    for i in tl.static_range(HYPERPARAMETER_COUNT):
        number_ptr = record_ptr + tasks.HYPERPARAMETERS + i * tasks.NUMBER_WORDS
        hyperparameters = hyperparameters + (tasks.number_at(number_ptr),)

    task_ptrs = (
        tl.load(record_ptr + tasks.TASKS).to(tl.pointer_type(tl.int64)) + task * tasks.TASK_WORDS
    )
    one = tl.full([BLOCK], 1.0, tl.float64)
    step = _advance(
        task_ptrs + tasks.STEP_COUNTER, tasks.real_at(record_ptr + tasks.STEP), one, 1, steps
    )
    step = tl.where(steps, step, 1.0)  # or corrections would be divisions by zero
    product = tl.zeros_like(one)
    if FACTOR is not None:
        factor = FACTOR(hyperparameters, step)
        known = tasks.real_at(record_ptr + tasks.PRODUCT)
        product = _advance(task_ptrs + tasks.PRODUCT_COUNTER, known, factor, 0, steps)
        product = tl.where(steps, product, 0.0)

    functors = tl.load(record_ptr + tasks.FUNCTORS) + task * tasks.FUNCTOR_BYTES
    functor = FOLD(hyperparameters, step, product)
    tasks.store_functor(tasks.scalars_at(functors, STORED), functor, steps, LAYOUT)


@triton.jit
def _sum_of_squares(pointers, mask):
    values = tasks.loaded(pointers, mask).to(tl.float64)
    return tl.sum(values * values, 0)


@triton.jit(do_not_specialize=["place"])
def _grad_norm_kernel(
    records_ptr, place, partials_ptr, STORED: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The sum of the squares of a chunk of a gradient."""
    record_ptr = records_ptr + place
    _, task_ptr, grad, start, end = tasks.find_share(record_ptr, CHUNK)
    walk = tl.load(task_ptr + tasks.WALK)
    is_dense = tl.load((task_ptr + tasks.IS_DENSE).to(tl.pointer_type(tl.int8))) != 0
    walk = tl.where(is_dense, 0, walk)  # whatever order the others lie in
    total = tl.full((), 0.0, tl.float64)
    if grad != 0:
        wide_end = tasks.wide_end(start, end, (walk == 0) & (grad % 16 == 0), STORED)
        for first in range(start, wide_end, WIDE):
            element = first + tl.arange(0, WIDE)
            grads = tasks.aligned_at(grad, STORED) + element
            total += _sum_of_squares(grads, element < wide_end)
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            grads = tasks.elements_at(grad, walk, tasks.GRAD, element, STORED)
            total += _sum_of_squares(grads, element < end)
    chunk = tl.load(record_ptr + tasks.FIRST_CHUNK) + tl.program_id(0)
    tl.store(partials_ptr + chunk, total)

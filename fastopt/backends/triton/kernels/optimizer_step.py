"""One loop for every optimizer: a program takes a chunk of a tensor.

What a launch reads lies in a record of words of eight bytes (csrc/bindings/triton_plan.cpp), which
names a table of tasks (csrc/core/card_tasks.h), one for each parameter, with the addresses that
stay; those of the gradients follow the record. The update rule (``update_rules.py``) is a function
among the kernels' constants; the scalars that are folded for it, its functor, lie in words of the
type of the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels import state_codes as codes
from fastopt.backends.triton.kernels.precision import rounded, store_rounded
from fastopt.backends.triton.kernels.update_rules import lerp, lerp_of

# Storage by the numbers of core/dtypes.h.
STORAGE = (tl.float32, tl.float64, tl.bfloat16, tl.float16)

# Words of a record.
TASKS = tl.constexpr(0)
BEGIN = tl.constexpr(1)
END = tl.constexpr(2)
FIRST_CHUNK = tl.constexpr(3)
FUNCTORS = tl.constexpr(4)
FOUND_INF = tl.constexpr(5)
STEP = tl.constexpr(6)
PRODUCT = tl.constexpr(7)
MAXIMIZE = tl.constexpr(8)
IS_L2 = tl.constexpr(9)
CHANGES_GRADIENTS = tl.constexpr(10)
ZERO_GRAD = tl.constexpr(11)
MOVES_AVERAGES = tl.constexpr(12)
CLIP_VALUE = tl.constexpr(13)
AVERAGE_WEIGHT = tl.constexpr(14)
DECAY = tl.constexpr(15)
GRAD_SCALE = tl.constexpr(18)
HYPERPARAMETERS = tl.constexpr(21)
NUMBER_WORDS = tl.constexpr(3)
FUNCTOR = tl.constexpr(42)
GRADS = tl.constexpr(50)

# Words of a task.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
AVERAGE = tl.constexpr(2)
FIRST_SLOT = tl.constexpr(3)
STEP_COUNTER = tl.constexpr(6)  # an address and the number of a dtype
PRODUCT_COUNTER = tl.constexpr(8)
WALK = tl.constexpr(10)
CODING = tl.constexpr(11)
NUMEL = tl.constexpr(12)
TASK_FIRST_CHUNK = tl.constexpr(13)
IS_DENSE = tl.constexpr(14)  # a byte, of the gradient
TASK_WORDS = tl.constexpr(15)

# Words of a walk, after its number of dimensions.
WALK_SIZES = tl.constexpr(1)
WALK_STRIDES = tl.constexpr(65)
MAX_DIMS = tl.constexpr(64)

# Words of a coding.
LARGEST = tl.constexpr(2)
REMAINDER = tl.constexpr(6)
SEED = tl.constexpr(7)
NUMBER = tl.constexpr(8)

# In the place of a gradient's address: nothing is done for its task.
LEAVE_ALONE = tl.constexpr(1)
FUNCTOR_BYTES = tl.constexpr(64)
# Of a functor's words, in a layout with a letter for each.
FLAG = tl.constexpr("f")


@triton.jit
def _scalars(address, STORED: tl.constexpr):
    """Pointers to numbers of the type that elements are computed with."""
    if STORED == tl.float64:
        return address.to(tl.pointer_type(tl.float64))
    else:
        return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _narrowed(x, STORED: tl.constexpr):
    """A double in the type that elements are computed with."""
    return x if STORED == tl.float64 else x.to(tl.float32)


@triton.jit
def _real(word_ptr):
    """A word that is a double."""
    return tl.load(word_ptr).to(tl.float64, bitcast=True)


@triton.jit
def _number(number_ptr):
    """A number that the host knew, or has to be read where it lies on the card."""
    known = _real(number_ptr)
    address = tl.load(number_ptr + 1)
    is_double = tl.load(number_ptr + 2)
    wide = tl.load(
        address.to(tl.pointer_type(tl.float64)), mask=(address != 0) & (is_double != 0), other=0.0
    )
    narrow = tl.load(
        address.to(tl.pointer_type(tl.float32)), mask=(address != 0) & (is_double == 0), other=0.0
    )
    return tl.where(address == 0, known, wide + narrow)


@triton.jit
def _is_skipped(record_ptr):
    """Whether a gradient scaler has found infinities or NaN."""
    address = tl.load(record_ptr + FOUND_INF)
    found_inf = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return found_inf != 0


@triton.jit
def _find_share(record_ptr, CHUNK: tl.constexpr):
    """The last task that starts at or before the program's chunk, and its elements."""
    tasks_ptr = tl.load(record_ptr + TASKS).to(tl.pointer_type(tl.int64))
    chunk = tl.load(record_ptr + FIRST_CHUNK) + tl.program_id(0)
    low = tl.load(record_ptr + BEGIN)
    high = tl.load(record_ptr + END)
    while high - low > 1:
        middle = (low + high) // 2
        is_behind = tl.load(tasks_ptr + middle * TASK_WORDS + TASK_FIRST_CHUNK) <= chunk
        low = tl.where(is_behind, middle, low)
        high = tl.where(is_behind, high, middle)
    task_ptr = tasks_ptr + low * TASK_WORDS
    start = (chunk - tl.load(task_ptr + TASK_FIRST_CHUNK)) * CHUNK
    end = tl.minimum(tl.load(task_ptr + NUMEL), start + CHUNK)
    grad = tl.load(record_ptr + GRADS + low - tl.load(record_ptr + BEGIN))
    return low, task_ptr, grad, start, end


@triton.jit
def _offset(walk, operand, element):
    """Of an operand's element in memory; without a walk all lie one behind the other."""
    walk_ptr = walk.to(tl.pointer_type(tl.int64))
    dims = tl.load(walk.to(tl.pointer_type(tl.int32)), mask=walk != 0, other=0)
    offset = tl.zeros_like(element)
    for behind in range(dims):
        dim = dims - 1 - behind
        size = tl.load(walk_ptr + WALK_SIZES + dim)
        offset += element % size * tl.load(walk_ptr + WALK_STRIDES + operand * MAX_DIMS + dim)
        element //= size
    return offset + element


@triton.jit
def _wide_end(start, end, is_wide, STORED: tl.constexpr):
    """Where the elements end that can be read 16 bytes at a time."""
    LANES: tl.constexpr = 128 // STORED.primitive_bitwidth
    return start + tl.where(is_wide, (end - start) // LANES, 0) * LANES


@triton.jit
def _aligned(address, STORED: tl.constexpr):
    """A pointer at which 16 bytes can be read at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(STORED)), 16)


@triton.jit
def _dense(address, element, STORED: tl.constexpr):
    """Pointers to elements that lie one behind the other."""
    return address.to(tl.pointer_type(STORED)) + element


@triton.jit
def _at(address, walk, operand, element, STORED: tl.constexpr):
    """Pointers to an operand's elements."""
    return _dense(address, _offset(walk, operand, element), STORED)


@triton.jit
def _clamp(x, limit):
    """Into [-limit, limit]; a NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _flags(word_ptrs):
    """Pointers to flags, which lie in the first bytes of their words."""
    return word_ptrs.to(tl.pointer_type(tl.int8))


@triton.jit
def _functor(functor_ptr, LAYOUT: tl.constexpr):
    """The scalars of a rule."""
    functor = ()
    for word in tl.static_range(len(LAYOUT)):
        if LAYOUT[word] == FLAG:
            functor = functor + (tl.load(_flags(functor_ptr + word)) != 0,)
        else:
            functor = functor + (tl.load(functor_ptr + word),)
    return functor


@triton.jit
def _store_functor(functor_ptrs, functor, mask, LAYOUT: tl.constexpr):
    """As ``_functor`` reads it."""
    for word in tl.static_range(len(LAYOUT)):
        if LAYOUT[word] == FLAG:
            tl.store(_flags(functor_ptrs + word), functor[word].to(tl.int8), mask=mask)
        else:
            tl.store(functor_ptrs + word, functor[word], mask=mask)


@triton.jit
def _tail(record_ptr, STORED: tl.constexpr):
    """What surrounds a rule: flags, and scalars in the type of the arithmetic."""
    is_l2 = tl.load(record_ptr + IS_L2) != 0
    maximize = tl.load(record_ptr + MAXIMIZE) != 0
    changes_gradients = tl.load(record_ptr + CHANGES_GRADIENTS) != 0
    zero_grad = tl.load(record_ptr + ZERO_GRAD) != 0
    decay = _narrowed(_number(record_ptr + DECAY), STORED)
    grad_scale = _narrowed(_number(record_ptr + GRAD_SCALE), STORED)
    clip_value = _narrowed(_real(record_ptr + CLIP_VALUE), STORED)
    weight = _real(record_ptr + AVERAGE_WEIGHT)
    coefficient, nearer_to_end = lerp_of(weight)
    average = _narrowed(coefficient, STORED), nearer_to_end
    copies = weight == 1
    return (
        is_l2, maximize, changes_gradients, zero_grad, decay, grad_scale, clip_value, average,
        copies,
    )  # fmt: skip


@triton.jit
def _loaded(pointers, mask):
    """In the type of the arithmetic."""
    x = tl.load(pointers, mask=mask, other=0.0)
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _updated(functor, tail, param, grad, state, STORED: tl.constexpr, UPDATE: tl.constexpr):
    """The gradient as it is stored, and the new parameter with the new state behind it."""
    is_l2, maximize, changes_gradients, zero_grad, decay, scale, clip_value, _, _ = tail
    scaled = rounded(_clamp(scale * grad, clip_value), STORED).to(grad.dtype)
    grad = tl.where(changes_gradients, scaled, grad)
    ascent = tl.where(maximize, -grad, grad)
    ascent = tl.where(is_l2, ascent + decay * param, ascent)
    decayed = tl.where(is_l2, param, decay * param)
    updated = UPDATE(functor, decayed, ascent, state)
    return tl.where(zero_grad, tl.zeros_like(grad), grad), updated


@triton.jit
def _averaged(tail, average, param):
    _, _, _, _, _, _, _, moved, copies = tail
    return tl.where(copies, param, lerp(average, param, moved[0], moved[1]))


@triton.jit
def _writes_gradients(tail):
    _, _, changes_gradients, zero_grad, _, _, _, _, _ = tail
    return changes_gradients | zero_grad


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
    writes_grad = element < tl.where(_writes_gradients(tail), step_end, 0)
    param = _loaded(params, steps | moves)
    grad = _loaded(grads, steps)
    average = _loaded(averages, moves)
    state = ()
    for s in tl.static_range(SLOTS):
        state = state + (_loaded(slots[s], steps),)

    grad, updated = _updated(functor, tail, param, grad, state, STORED, UPDATE)
    param = tl.where(steps, rounded(updated[0], STORED).to(param.dtype), param)
    average = _averaged(tail, average, param)

    store_rounded(params, param, steps)
    store_rounded(grads, grad, writes_grad)
    store_rounded(averages, average, moves)
    for s in tl.static_range(SLOTS):
        store_rounded(slots[s], updated[1 + s], steps)


@triton.jit
def _zero_grad(
    record_ptr, grad, walk, start, end, STORED: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    """Of a step that is skipped."""
    if tl.load(record_ptr + ZERO_GRAD) != 0:
        for first in range(start, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            zeros = tl.zeros([ELEMENTS], STORED)
            tl.store(_at(grad, walk, GRAD, element, STORED), zeros, mask=element < end)


@triton.jit
def _functor_of(record_ptr, task, STORED: tl.constexpr, LAYOUT: tl.constexpr):
    """A task's own, or the one in the record."""
    functors = tl.load(record_ptr + FUNCTORS)
    own = (record_ptr + FUNCTOR).to(tl.int64)
    address = tl.where(functors != 0, functors + task * FUNCTOR_BYTES, own)
    return _functor(_scalars(address, STORED), LAYOUT)


@triton.jit(do_not_specialize=["place"])
def _optimizer_step_kernel(
    records_ptr, place, UPDATE: tl.constexpr, LAYOUT: tl.constexpr, SLOTS: tl.constexpr,
    STORED: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Steps a chunk: 16 bytes at a time as far as that goes, the rest element by element."""
    record_ptr = records_ptr + place
    is_skipped = _is_skipped(record_ptr)
    task, task_ptr, grad, start, end = _find_share(record_ptr, CHUNK)
    walk = tl.load(task_ptr + WALK)
    param = tl.load(task_ptr + PARAM)
    average = tl.load(task_ptr + AVERAGE)
    slots = ()
    for s in tl.static_range(SLOTS):
        slots = slots + (tl.load(task_ptr + FIRST_SLOT + s),)
    tail = _tail(record_ptr, STORED)

    is_there = grad != LEAVE_ALONE
    has_grad = (grad != 0) & is_there
    moves = is_there & (average != 0) & (tl.load(record_ptr + MOVES_AVERAGES) != 0)
    if is_skipped:
        _zero_grad(record_ptr, grad, walk, start, tl.where(has_grad, end, start), STORED, ELEMENTS)
    elif has_grad | moves:
        functor = _functor_of(record_ptr, task, STORED, LAYOUT)
        addresses = param | grad | average
        for s in tl.static_range(SLOTS):
            addresses |= slots[s]
        wide_end = _wide_end(start, end, (walk == 0) & (addresses % 16 == 0), STORED)
        for first in range(start, wide_end, WIDE):
            element = first + tl.arange(0, WIDE)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (_aligned(slots[s], STORED) + element,)
            _step_elements(
                functor, tail, element, tl.where(has_grad, wide_end, 0),
                tl.where(moves, wide_end, 0), _aligned(param, STORED) + element,
                _aligned(grad, STORED) + element, _aligned(average, STORED) + element, at,
                UPDATE, SLOTS,
            )  # fmt: skip
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (_at(slots[s], walk, FIRST_SLOT + s, element, STORED),)
            _step_elements(
                functor, tail, element, tl.where(has_grad, end, 0), tl.where(moves, end, 0),
                _at(param, walk, PARAM, element, STORED), _at(grad, walk, GRAD, element, STORED),
                _at(average, walk, AVERAGE, element, STORED), at, UPDATE, SLOTS,
            )  # fmt: skip


@triton.jit
def _step_of(record_ptr, task_ptr):
    """The number of a task's step, which the card has counted or the host."""
    address = tl.load(task_ptr + STEP_COUNTER)
    is_double = tl.load((task_ptr + STEP_COUNTER + 1).to(tl.pointer_type(tl.int32))) == 1
    wide = tl.load(
        address.to(tl.pointer_type(tl.float64)), mask=(address != 0) & is_double, other=0.0
    )
    narrow = tl.load(
        address.to(tl.pointer_type(tl.float32)), mask=(address != 0) & ~is_double, other=0.0
    )
    return tl.where(address == 0, _real(record_ptr + STEP), wide + narrow).to(tl.int64)


@triton.jit
def _step_coded_elements(
    functor, tail, task_ptr, words, first, step_end, average_end, params, grads, averages, slots,
    remainders, UPDATE: tl.constexpr, POSITIVE: tl.constexpr, CODE: tl.constexpr,
    PARAM_CODE: tl.constexpr,
):  # fmt: skip
    """As ``_step_elements``, of whole blocks that begin with ``first``, as far as they are there.

    POSITIVE has a bit for each slot that is never negative.
    """
    STORED: tl.constexpr = params.dtype.element_ty
    TILE: tl.constexpr = params.shape[0]
    element = first + tl.arange(0, TILE)
    steps = element < step_end
    moves = element < average_end
    writes_grad = element < tl.where(_writes_gradients(tail), step_end, 0)
    coding_ptr = tl.load(task_ptr + CODING).to(tl.pointer_type(tl.int64))
    block = first // codes.CODE_BLOCK + tl.arange(0, TILE // codes.CODE_BLOCK)
    is_block = block * codes.CODE_BLOCK < step_end

    stored = _loaded(params, steps | moves)
    grad = _loaded(grads, steps)
    average = _loaded(averages, moves)
    param = stored
    if PARAM_CODE == codes.KAHAN:
        param = codes.with_kahan_remainder(stored, _loaded(remainders, steps))
    elif PARAM_CODE == codes.MASTER:
        param = codes.with_master_remainder(stored, tl.load(remainders, mask=steps, other=0))
    state = ()
    for s in tl.static_range(len(slots)):
        if CODE == codes.BLOCKWISE8:
            largest_ptrs = _dense(tl.load(coding_ptr + LARGEST + s), block, tl.float32)
            largest = tl.load(largest_ptrs, mask=is_block, other=0.0)
            code = tl.load(slots[s], mask=steps, other=0)
            state = state + (codes.decoded(code, largest, (POSITIVE >> s) & 1 == 1),)
        else:
            state = state + (_loaded(slots[s], steps),)

    grad, updated = _updated(functor, tail, param, grad, state, STORED, UPDATE)
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
    store_rounded(averages, _averaged(tail, average, stored), moves)
    if CODE >= codes.BFLOAT16:
        chances = codes.state_chances(words, TILE)
    for s in tl.static_range(len(slots)):
        if CODE == codes.BLOCKWISE8:
            largest = codes.largest_of_blocks(updated[1 + s], steps)
            largest_ptrs = _dense(tl.load(coding_ptr + LARGEST + s), block, tl.float32)
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
    """The same of state that is stored otherwise than in the parameter's dtype.

    The parameter is dense and its state lies as it does; the gradient may lie otherwise.
    """
    record_ptr = records_ptr + place
    is_skipped = _is_skipped(record_ptr)
    task, task_ptr, grad, start, end = _find_share(record_ptr, CHUNK)
    walk = tl.load(task_ptr + WALK)
    param = tl.load(task_ptr + PARAM)
    average = tl.load(task_ptr + AVERAGE)
    coding_ptr = tl.load(task_ptr + CODING).to(tl.pointer_type(tl.int64))
    remainder = tl.load(coding_ptr + REMAINDER)
    REMAINDER_STORED: tl.constexpr = tl.uint16 if PARAM_CODE == codes.MASTER else tl.bfloat16
    slots = ()
    for s in tl.static_range(SLOTS):
        slots = slots + (tl.load(task_ptr + FIRST_SLOT + s),)
    tail = _tail(record_ptr, STORED)

    is_there = grad != LEAVE_ALONE
    has_grad = (grad != 0) & is_there
    moves = is_there & (average != 0) & (tl.load(record_ptr + MOVES_AVERAGES) != 0)
    if is_skipped:
        _zero_grad(record_ptr, grad, walk, start, tl.where(has_grad, end, start), STORED, ELEMENTS)
    elif has_grad | moves:
        functor = _functor_of(record_ptr, task, STORED, LAYOUT)
        group = start // codes.ELEMENTS_OF_GROUP
        step = _step_of(record_ptr, task_ptr)
        seed = tl.load(coding_ptr + SEED)
        words = codes.drawn(seed, tl.load(coding_ptr + NUMBER), step, group)
        addresses = param | grad | average | remainder
        for s in tl.static_range(SLOTS):
            addresses |= slots[s]
        is_wide = (walk == 0) & (addresses % 16 == 0)
        wide_end = start + tl.where(is_wide, (end - start) // TILE, 0) * TILE
        for first in range(start, wide_end, TILE):
            element = first + tl.arange(0, TILE)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (_aligned(slots[s], SLOT_STORED) + element,)
            _step_coded_elements(
                functor, tail, task_ptr, words, first, tl.where(has_grad, wide_end, 0),
                tl.where(moves, wide_end, 0), _aligned(param, STORED) + element,
                _aligned(grad, STORED) + element, _aligned(average, STORED) + element, at,
                _aligned(remainder, REMAINDER_STORED) + element, UPDATE, POSITIVE, CODE, PARAM_CODE,
            )  # fmt: skip
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (_dense(slots[s], element, SLOT_STORED),)
            _step_coded_elements(
                functor, tail, task_ptr, words, first, tl.where(has_grad, end, 0),
                tl.where(moves, end, 0), _dense(param, element, STORED),
                _at(grad, walk, GRAD, element, STORED),
                _at(average, walk, AVERAGE, element, STORED), at,
                _dense(remainder, element, REMAINDER_STORED), UPDATE, POSITIVE, CODE, PARAM_CODE,
            )  # fmt: skip


@triton.jit
def _advance_as(address, factor, summand, mask, STORED: tl.constexpr):
    """The new number: the old * factor + summand, rounded to its type."""
    pointers = address.to(tl.pointer_type(STORED))
    number = _loaded(pointers, mask)
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
    begin = tl.load(record_ptr + BEGIN)
    task = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_task = task < tl.where(_is_skipped(record_ptr), begin, tl.load(record_ptr + END))
    grad = tl.load(record_ptr + GRADS + task - begin, mask=is_task, other=0)
    steps = (grad != 0) & (grad != LEAVE_ALONE)
    hyperparameters = ()
    for i in tl.static_range(HYPERPARAMETER_COUNT):
        number_ptr = record_ptr + HYPERPARAMETERS + i * NUMBER_WORDS
        hyperparameters = hyperparameters + (_number(number_ptr),)

    task_ptrs = tl.load(record_ptr + TASKS).to(tl.pointer_type(tl.int64)) + task * TASK_WORDS
    one = tl.full([BLOCK], 1.0, tl.float64)
    step = _advance(task_ptrs + STEP_COUNTER, _real(record_ptr + STEP), one, 1, steps)
    step = tl.where(steps, step, 1.0)  # or corrections would be divisions by zero
    product = tl.zeros_like(one)
    if FACTOR is not None:
        factor = FACTOR(hyperparameters, step)
        known = _real(record_ptr + PRODUCT)
        product = _advance(task_ptrs + PRODUCT_COUNTER, known, factor, 0, steps)
        product = tl.where(steps, product, 0.0)

    functors = tl.load(record_ptr + FUNCTORS) + task * FUNCTOR_BYTES
    functor = FOLD(hyperparameters, step, product)
    _store_functor(_scalars(functors, STORED), functor, steps, LAYOUT)


@triton.jit
def _sum_of_squares(pointers, mask):
    values = _loaded(pointers, mask).to(tl.float64)
    return tl.sum(values * values, 0)


@triton.jit(do_not_specialize=["place"])
def _grad_norm_kernel(
    records_ptr, place, partials_ptr, STORED: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The sum of the squares of a chunk of a gradient."""
    record_ptr = records_ptr + place
    _, task_ptr, grad, start, end = _find_share(record_ptr, CHUNK)
    walk = tl.load(task_ptr + WALK)
    is_dense = tl.load((task_ptr + IS_DENSE).to(tl.pointer_type(tl.int8))) != 0
    walk = tl.where(is_dense, 0, walk)  # whatever order the others lie in
    total = tl.full((), 0.0, tl.float64)
    if grad != 0:
        wide_end = _wide_end(start, end, (walk == 0) & (grad % 16 == 0), STORED)
        for first in range(start, wide_end, WIDE):
            element = first + tl.arange(0, WIDE)
            grads = _aligned(grad, STORED) + element
            total += _sum_of_squares(grads, element < wide_end)
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            grads = _at(grad, walk, GRAD, element, STORED)
            total += _sum_of_squares(grads, element < end)
    chunk = tl.load(record_ptr + FIRST_CHUNK) + tl.program_id(0)
    tl.store(partials_ptr + chunk, total)

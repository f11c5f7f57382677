"""One loop for every optimizer: a program takes a chunk of a tensor.

What a launch reads lies in a record of words of eight bytes (csrc/bindings/triton_plan.cpp), which
names a table of tasks (csrc/core/card_tasks.h), one for each parameter, with the addresses that
stay; those of the gradients follow the record. The update rules and the scalars that are folded for
them, functors, are those of csrc/core/update_rules.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.precision import rounded, store_rounded

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
MAXIMIZE = tl.constexpr(7)
IS_L2 = tl.constexpr(8)
CHANGES_GRADIENTS = tl.constexpr(9)
ZERO_GRAD = tl.constexpr(10)
MOVES_AVERAGES = tl.constexpr(11)
CLIP_VALUE = tl.constexpr(12)
AVERAGE_WEIGHT = tl.constexpr(13)
DECAY = tl.constexpr(14)
GRAD_SCALE = tl.constexpr(17)
HYPERPARAMETERS = tl.constexpr(20)
NUMBER_WORDS = tl.constexpr(3)
FUNCTOR = tl.constexpr(38)
GRADS = tl.constexpr(46)

# Words of a task.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
AVERAGE = tl.constexpr(2)
FIRST_SLOT = tl.constexpr(3)
COUNTER = tl.constexpr(6)
WALK = tl.constexpr(7)
NUMEL = tl.constexpr(8)
TASK_FIRST_CHUNK = tl.constexpr(9)
FLAGS = tl.constexpr(10)  # bytes: the counter is a double; the gradient is dense
TASK_WORDS = tl.constexpr(11)

# Words of a walk, after its number of dimensions.
WALK_SIZES = tl.constexpr(1)
WALK_STRIDES = tl.constexpr(65)
MAX_DIMS = tl.constexpr(64)

# In the place of a gradient's address: nothing is done for its task.
LEAVE_ALONE = tl.constexpr(1)
FUNCTOR_BYTES = tl.constexpr(64)


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
def _at(address, walk, operand, element, STORED: tl.constexpr):
    """Pointers to an operand's elements."""
    return address.to(tl.pointer_type(STORED)) + _offset(walk, operand, element)


@triton.jit
def _lerp_of(weight):
    """What ``_lerp`` takes: a coefficient, and whether the weight is nearer to the end."""
    nearer_to_end = weight >= 0.5
    return tl.where(nearer_to_end, weight - 1, weight), nearer_to_end


@triton.jit
def _lerp(start, end, lerp):
    """As torch.lerp, from the nearer end."""
    coefficient, nearer_to_end = lerp
    return tl.where(nearer_to_end, end, start) + coefficient * (end - start)


@triton.jit
def _clamp(x, limit):
    """Into [-limit, limit]; a NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _lerp_at(scalar_ptr):
    """Coefficient and flag of a Lerp; the flag is in the first byte of its place."""
    flag = tl.load((scalar_ptr + 1).to(tl.pointer_type(tl.int8)))
    return tl.load(scalar_ptr), flag != 0


@triton.jit
def _functor(functor_ptr, RULE: tl.constexpr):
    """The scalars of a rule, in the order of the functor's own."""
    first = tl.load(functor_ptr)
    if RULE == "sgd":
        return (first,)
    elif RULE == "lion":
        return first, _lerp_at(functor_ptr + 1), _lerp_at(functor_ptr + 3)
    elif RULE == "momentum" or RULE == "nesterov":
        second, third = tl.load(functor_ptr + 1), tl.load(functor_ptr + 2)
        return first, second, third, tl.load(functor_ptr + 3), tl.load(functor_ptr + 4)
    else:
        tl.static_assert(RULE == "adam" or RULE == "amsgrad")
        average = _lerp_at(functor_ptr + 1)
        fourth, fifth = tl.load(functor_ptr + 3), tl.load(functor_ptr + 4)
        return first, average, fourth, fifth, tl.load(functor_ptr + 5), tl.load(functor_ptr + 6)


@triton.jit
def sgd(functor, param, grad):
    """Gradient descent."""
    (lr,) = functor
    return (param - lr * grad,)


@triton.jit
def momentum(functor, param, grad, buffer):
    """Polyak's heavy ball."""
    step_size, _, buffer_decay, gradient_weight, _ = functor
    buffer = buffer_decay * buffer + gradient_weight * grad
    return param - step_size * buffer, buffer


@triton.jit
def nesterov(functor, param, grad, buffer):
    """Momentum that looks one step ahead."""
    step_size, decay, _, _, undamped_gradient_weight = functor
    _, buffer = momentum(functor, param, grad, buffer)
    return param - step_size * (undamped_gradient_weight * grad + decay * buffer), buffer


@triton.jit
def _square_root(x):
    """Correctly rounded: the quick one of fp32 takes subnormal numbers for zeros."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def adam(functor, param, grad, first_moment, second_moment):
    """Kingma and Ba 2015, algorithm 1."""
    step_size, average, beta2, second_weight, inverse_sqrt_correction, eps = functor
    first_moment = _lerp(first_moment, grad, average)
    second_moment = beta2 * second_moment + second_weight * grad * grad
    divisor = _square_root(second_moment) * inverse_sqrt_correction + eps
    return param - step_size * first_moment / divisor, first_moment, second_moment


@triton.jit
def amsgrad(functor, param, grad, first_moment, second_moment, largest):
    """Reddi et al. 2018, with Adam's bias correction as torch has it."""
    step_size, _, _, _, inverse_sqrt_correction, eps = functor
    _, first_moment, second_moment = adam(functor, param, grad, first_moment, second_moment)
    is_larger = (second_moment > largest) | (second_moment != second_moment)  # a NaN wins
    largest = tl.where(is_larger, second_moment, largest)
    divisor = _square_root(largest) * inverse_sqrt_correction + eps
    return param - step_size * first_moment / divisor, first_moment, second_moment, largest


@triton.jit
def lion(functor, param, grad, moment):
    """Chen et al. 2023, algorithm 2."""
    lr, update_average, moment_average = functor
    update = _lerp(moment, grad, update_average)
    sign = (update > 0).to(param.dtype) - (update < 0).to(param.dtype)
    return param - lr * sign, _lerp(moment, grad, moment_average)


@triton.jit
def _updated(RULE: tl.constexpr, functor, param, grad, slots):
    """The new parameter, and the new state behind it."""
    if RULE == "sgd":
        return sgd(functor, param, grad)
    elif RULE == "momentum":
        return momentum(functor, param, grad, slots[0])
    elif RULE == "nesterov":
        return nesterov(functor, param, grad, slots[0])
    elif RULE == "adam":
        return adam(functor, param, grad, slots[0], slots[1])
    elif RULE == "amsgrad":
        return amsgrad(functor, param, grad, slots[0], slots[1], slots[2])
    else:
        tl.static_assert(RULE == "lion")
        return lion(functor, param, grad, slots[0])


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
    coefficient, nearer_to_end = _lerp_of(weight)
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
def _step_elements(
    functor, tail, element, step_end, average_end, params, grads, averages, slots,
    RULE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The update of elements, and what surrounds it; the ends are 0 where there is none of it.

    In the interpreter, masks that are scalars do not mix with others.
    """
    STORED: tl.constexpr = params.dtype.element_ty
    is_l2, maximize, changes_gradients, zero_grad, decay, scale, clip_value, lerp, copies = tail
    steps = element < step_end
    moves = element < average_end
    writes_grad = element < tl.where(changes_gradients | zero_grad, step_end, 0)
    param = _loaded(params, steps | moves)
    grad = _loaded(grads, steps)
    average = _loaded(averages, moves)
    state = ()
    for s in tl.static_range(SLOTS):
        state = state + (_loaded(slots[s], steps),)

    scaled = rounded(_clamp(scale * grad, clip_value), STORED).to(grad.dtype)
    grad = tl.where(changes_gradients, scaled, grad)
    ascent = tl.where(maximize, -grad, grad)
    ascent = tl.where(is_l2, ascent + decay * param, ascent)
    decayed = tl.where(is_l2, param, decay * param)
    updated = _updated(RULE, functor, decayed, ascent, state)
    param = tl.where(steps, rounded(updated[0], STORED).to(param.dtype), param)
    average = tl.where(copies, param, _lerp(average, param, lerp))

    store_rounded(params, param, steps)
    store_rounded(grads, tl.where(zero_grad, tl.zeros_like(grad), grad), writes_grad)
    store_rounded(averages, average, moves)
    for s in tl.static_range(SLOTS):
        store_rounded(slots[s], updated[1 + s], steps)


@triton.jit(do_not_specialize=["place"])
def _optimizer_step_kernel(
    records_ptr, place, RULE: tl.constexpr, SLOTS: tl.constexpr, STORED: tl.constexpr,
    CHUNK: tl.constexpr, WIDE: tl.constexpr, ELEMENTS: tl.constexpr,
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
        if has_grad & (tl.load(record_ptr + ZERO_GRAD) != 0):
            for first in range(start, end, ELEMENTS):
                element = first + tl.arange(0, ELEMENTS)
                zeros = tl.zeros([ELEMENTS], STORED)
                tl.store(_at(grad, walk, GRAD, element, STORED), zeros, mask=element < end)
    elif has_grad | moves:
        functors = tl.load(record_ptr + FUNCTORS)
        own = (record_ptr + FUNCTOR).to(tl.int64)
        address = tl.where(functors != 0, functors + task * FUNCTOR_BYTES, own)
        functor = _functor(_scalars(address, STORED), RULE)

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
                RULE, SLOTS,
            )  # fmt: skip
        for first in range(wide_end, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            at = ()
            for s in tl.static_range(SLOTS):
                at = at + (_at(slots[s], walk, FIRST_SLOT + s, element, STORED),)
            _step_elements(
                functor, tail, element, tl.where(has_grad, end, 0), tl.where(moves, end, 0),
                _at(param, walk, PARAM, element, STORED), _at(grad, walk, GRAD, element, STORED),
                _at(average, walk, AVERAGE, element, STORED), at, RULE, SLOTS,
            )  # fmt: skip


@triton.jit
def _power(base, exponent):
    """Of whole exponents, by squaring."""
    result = tl.full(exponent.shape, 1.0, tl.float64)
    while tl.max(exponent, 0) > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base *= base
        exponent //= 2
    return result


@triton.jit
def _store_lerp(functor_ptrs, weight, mask):
    """Coefficient and flag, as ``_lerp_at`` reads them."""
    coefficient, nearer_to_end = _lerp_of(weight)
    tl.store(functor_ptrs, coefficient, mask=mask)
    flags = (functor_ptrs + 1).to(tl.pointer_type(tl.int8))
    tl.store(flags, nearer_to_end.to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["place"])
def _advance_steps_kernel(
    records_ptr, place, RULE: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr
):
    """Counts the step of each task that has a gradient and folds its scalars into its functor."""
    record_ptr = records_ptr + place
    begin = tl.load(record_ptr + BEGIN)
    task = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_task = task < tl.where(_is_skipped(record_ptr), begin, tl.load(record_ptr + END))
    grad = tl.load(record_ptr + GRADS + task - begin, mask=is_task, other=0)
    steps = (grad != 0) & (grad != LEAVE_ALONE)

    task_ptrs = tl.load(record_ptr + TASKS).to(tl.pointer_type(tl.int64)) + task * TASK_WORDS
    counter = tl.load(task_ptrs + COUNTER, mask=steps, other=0)
    is_double = tl.load((task_ptrs + FLAGS).to(tl.pointer_type(tl.int8)), mask=steps, other=0) != 0
    wide_ptrs = counter.to(tl.pointer_type(tl.float64))
    narrow_ptrs = counter.to(tl.pointer_type(tl.float32))
    is_wide = (counter != 0) & is_double
    is_narrow = (counter != 0) & (is_double == 0)
    wide = tl.load(wide_ptrs, mask=is_wide, other=0.0) + 1
    narrow = tl.load(narrow_ptrs, mask=is_narrow, other=0.0) + 1
    tl.store(wide_ptrs, wide, mask=is_wide)
    tl.store(narrow_ptrs, narrow, mask=is_narrow)
    counted = tl.where(is_double, wide, narrow.to(tl.float64))
    step = tl.where(counter != 0, counted, _real(record_ptr + STEP))
    step = tl.where(steps, step, 1.0)  # or corrections would be divisions by zero

    functors = tl.load(record_ptr + FUNCTORS) + task * FUNCTOR_BYTES
    functor_ptrs = _scalars(functors, STORED)
    first = _number(record_ptr + HYPERPARAMETERS)
    second = _number(record_ptr + HYPERPARAMETERS + NUMBER_WORDS)
    third = _number(record_ptr + HYPERPARAMETERS + 2 * NUMBER_WORDS)
    fourth = _number(record_ptr + HYPERPARAMETERS + 3 * NUMBER_WORDS)
    if RULE == "sgd":
        tl.store(functor_ptrs, first, mask=steps)
    elif RULE == "momentum" or RULE == "nesterov":
        tl.store(functor_ptrs, first, mask=steps)
        tl.store(functor_ptrs + 1, second, mask=steps)
        # The first gradient enters the buffer undamped.
        tl.store(functor_ptrs + 2, tl.where(step == 1, 0.0, second), mask=steps)
        tl.store(functor_ptrs + 3, tl.where(step == 1, fourth, third), mask=steps)
        tl.store(functor_ptrs + 4, fourth, mask=steps)
    elif RULE == "adam" or RULE == "amsgrad":
        exponent = step.to(tl.int64)
        tl.store(functor_ptrs, first / (1 - _power(second, exponent)), mask=steps)
        _store_lerp(functor_ptrs + 1, 1 - second, steps)
        tl.store(functor_ptrs + 3, third, mask=steps)
        tl.store(functor_ptrs + 4, 1 - third, mask=steps)
        correction = 1 - _power(third, exponent)
        tl.store(functor_ptrs + 5, 1 / tl.sqrt(correction), mask=steps)
        tl.store(functor_ptrs + 6, fourth, mask=steps)
    else:
        tl.static_assert(RULE == "lion")
        tl.store(functor_ptrs, first, mask=steps)
        _store_lerp(functor_ptrs + 1, 1 - second, steps)
        _store_lerp(functor_ptrs + 3, 1 - third, steps)


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
    is_dense = tl.load((task_ptr + FLAGS).to(tl.pointer_type(tl.int8)) + 1) != 0
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

"""What a launch reads, as kernels of the step see it: records, tasks, walks, functors.

What a launch reads lies in a record of words of eight bytes (csrc/bindings/triton_plan.cpp), which
names a table of tasks (csrc/core/card_tasks.h), one for each parameter, with the addresses that
stay; those of the gradients follow the record. The scalars that are folded for a rule, its functor,
lie in words of the type of the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.precision import rounded
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
def scalars_at(address, STORED: tl.constexpr):
    """Pointers to numbers of the type that elements are computed with."""
    if STORED == tl.float64:
        return address.to(tl.pointer_type(tl.float64))
    else:
        return address.to(tl.pointer_type(tl.float32))


@triton.jit
def narrowed(x, STORED: tl.constexpr):
    """A double in the type that elements are computed with."""
    return x if STORED == tl.float64 else x.to(tl.float32)


@triton.jit
def real_at(word_ptr):
    """A word that is a double."""
    return tl.load(word_ptr).to(tl.float64, bitcast=True)


@triton.jit
def number_at(number_ptr):
    """A number that the host knew, or has to be read where it lies on the card."""
    known = real_at(number_ptr)
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
def is_skipped(record_ptr):
    """Whether a gradient scaler has found infinities or NaN."""
    address = tl.load(record_ptr + FOUND_INF)
    found_inf = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return found_inf != 0


@triton.jit
def find_share(record_ptr, CHUNK: tl.constexpr):
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
def wide_end(start, end, is_wide, STORED: tl.constexpr):
    """Where the elements end that can be read 16 bytes at a time."""
    LANES: tl.constexpr = 128 // STORED.primitive_bitwidth
    return start + tl.where(is_wide, (end - start) // LANES, 0) * LANES


@triton.jit
def aligned_at(address, STORED: tl.constexpr):
    """A pointer at which 16 bytes can be read at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(STORED)), 16)


@triton.jit
def dense_at(address, element, STORED: tl.constexpr):
    """Pointers to elements that lie one behind the other."""
    return address.to(tl.pointer_type(STORED)) + element


@triton.jit
def elements_at(address, walk, operand, element, STORED: tl.constexpr):
    """Pointers to an operand's elements."""
    return dense_at(address, _offset(walk, operand, element), STORED)


@triton.jit
def _clamp(x, limit):
    """Into [-limit, limit]; a NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _flags(word_ptrs):
    """Pointers to flags, which lie in the first bytes of their words."""
    return word_ptrs.to(tl.pointer_type(tl.int8))


@triton.jit
def read_functor(functor_ptr, LAYOUT: tl.constexpr):
    """The scalars of a rule."""
    functor = ()
    for word in tl.static_range(len(LAYOUT)):
        if LAYOUT[word] == FLAG:
            functor = functor + (tl.load(_flags(functor_ptr + word)) != 0,)
        else:
            functor = functor + (tl.load(functor_ptr + word),)
    return functor


@triton.jit
def store_functor(functor_ptrs, functor, mask, LAYOUT: tl.constexpr):
    """As ``_functor`` reads it."""
    for word in tl.static_range(len(LAYOUT)):
        if LAYOUT[word] == FLAG:
            tl.store(_flags(functor_ptrs + word), functor[word].to(tl.int8), mask=mask)
        else:
            tl.store(functor_ptrs + word, functor[word], mask=mask)


@triton.jit
def functor_of(record_ptr, task, STORED: tl.constexpr, LAYOUT: tl.constexpr):
    """A task's own, or the one in the record."""
    functors = tl.load(record_ptr + FUNCTORS)
    own = (record_ptr + FUNCTOR).to(tl.int64)
    address = tl.where(functors != 0, functors + task * FUNCTOR_BYTES, own)
    return read_functor(scalars_at(address, STORED), LAYOUT)


@triton.jit
def tail_of(record_ptr, STORED: tl.constexpr):
    """What surrounds a rule: flags, and scalars in the type of the arithmetic."""
    is_l2 = tl.load(record_ptr + IS_L2) != 0
    maximize = tl.load(record_ptr + MAXIMIZE) != 0
    changes_gradients = tl.load(record_ptr + CHANGES_GRADIENTS) != 0
    zero_grad = tl.load(record_ptr + ZERO_GRAD) != 0
    decay = narrowed(number_at(record_ptr + DECAY), STORED)
    grad_scale = narrowed(number_at(record_ptr + GRAD_SCALE), STORED)
    clip_value = narrowed(real_at(record_ptr + CLIP_VALUE), STORED)
    weight = real_at(record_ptr + AVERAGE_WEIGHT)
    coefficient, nearer_to_end = lerp_of(weight)
    average = narrowed(coefficient, STORED), nearer_to_end
    copies = weight == 1
    return (
        is_l2, maximize, changes_gradients, zero_grad, decay, grad_scale, clip_value, average,
        copies,
    )  # fmt: skip


@triton.jit
def loaded(pointers, mask):
    """In the type of the arithmetic."""
    x = tl.load(pointers, mask=mask, other=0.0)
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def averaged(tail, average, param):
    """The average after a step that has led to the parameter."""
    _, _, _, _, _, _, _, moved, copies = tail
    return tl.where(copies, param, lerp(average, param, moved[0], moved[1]))


@triton.jit
def writes_gradients(tail):
    """Whether gradients are clipped in place, or zeroed."""
    _, _, changes_gradients, zero_grad, _, _, _, _, _ = tail
    return changes_gradients | zero_grad


@triton.jit
def zero_gradients(
    record_ptr, grad, walk, start, end, STORED: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    """Of a step that is skipped."""
    if tl.load(record_ptr + ZERO_GRAD) != 0:
        for first in range(start, end, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            zeros = tl.zeros([ELEMENTS], STORED)
            tl.store(elements_at(grad, walk, GRAD, element, STORED), zeros, mask=element < end)


@triton.jit
def ascended(tail, param, grad, STORED: tl.constexpr):
    """The gradient as it is stored; the parameter, decayed, and the gradient that a rule sees."""
    is_l2, maximize, changes_gradients, _, decay, scale, clip_value, _, _ = tail
    scaled = rounded(_clamp(scale * grad, clip_value), STORED).to(grad.dtype)
    grad = tl.where(changes_gradients, scaled, grad)
    ascent = tl.where(maximize, -grad, grad)
    ascent = tl.where(is_l2, ascent + decay * param, ascent)
    return grad, tl.where(is_l2, param, decay * param), ascent


@triton.jit
def updated(functor, tail, param, grad, state, STORED: tl.constexpr, UPDATE: tl.constexpr):
    """The gradient as it is stored, and the new parameter with the new state behind it."""
    _, _, _, zero_grad, _, _, _, _, _ = tail
    grad, decayed, ascent = ascended(tail, param, grad, STORED)
    new = UPDATE(functor, decayed, ascent, state)
    return tl.where(zero_grad, tl.zeros_like(grad), grad), new


@triton.jit
def chunk_of_step(record_ptr, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """A program's task and its elements; addresses; whether it has a gradient and an average."""
    task, task_ptr, grad, start, end = find_share(record_ptr, CHUNK)
    slots = ()
    for s in tl.static_range(SLOTS):
        slots = slots + (tl.load(task_ptr + FIRST_SLOT + s),)
    addresses = tl.load(task_ptr + PARAM), grad, tl.load(task_ptr + AVERAGE), slots
    is_there = grad != LEAVE_ALONE
    has_grad = (grad != 0) & is_there
    moves = is_there & (addresses[2] != 0) & (tl.load(record_ptr + MOVES_AVERAGES) != 0)
    return task, task_ptr, start, end, addresses, has_grad, moves

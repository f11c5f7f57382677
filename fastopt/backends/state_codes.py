"""State of an optimizer that is not stored in its parameter's dtype: the codes, readable.

``csrc/core/state_codes.h`` has the same formulas for kernels.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import _native_cpu

BLOCK = 256  # elements that share a scale
SMALLEST = 1e-37  # a block whose largest magnitude is smaller is one of zeros


class SlotCode(enum.IntEnum):
    """How a state tensor is stored; the numbers are those of core/state_codes.h."""

    AS_PARAMETER = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    BLOCKWISE8 = 3


class ParamCode(enum.IntEnum):
    """What a bf16 parameter is beside its own 16 bits."""

    ROUNDED = 0
    STOCHASTIC = 1
    KAHAN = 2
    MASTER = 3


# Options of an optimizer, and keys of its groups, that say how state is stored.
STORAGE_OPTIONS = ("state_storage", "param_precision")

STORAGES = {
    None: SlotCode.AS_PARAMETER,
    "fp32": SlotCode.FLOAT32,
    "bf16": SlotCode.BFLOAT16,
    "8bit": SlotCode.BLOCKWISE8,
}
PRECISIONS = {
    None: ParamCode.ROUNDED,
    "stochastic": ParamCode.STOCHASTIC,
    "kahan": ParamCode.KAHAN,
    "master": ParamCode.MASTER,
}

DTYPES = {
    SlotCode.FLOAT32: torch.float32,
    SlotCode.BFLOAT16: torch.bfloat16,
    SlotCode.BLOCKWISE8: torch.uint8,
}

# The state beside a parameter, and its dtype.
REMAINDERS = {
    ParamCode.KAHAN: ("compensation", torch.bfloat16),
    ParamCode.MASTER: ("master_remainder", torch.int16),
}


class StateCoding(NamedTuple):
    """How one parameter and the state tensors of its rule are stored."""

    slots: tuple[SlotCode, ...]
    param: ParamCode


class CodedState(NamedTuple):
    """What step_plan.h calls a coding.

    Attributes:
        slots: How the state tensors are stored.
        largest: The largest magnitudes of their blocks, or None.
        param: What the parameter is beside its own bits.
        remainder: Those other bits, or None.
        seed: Of random numbers, with the parameter's number and its step.
        number: Counted through all groups.
    """

    slots: tuple[SlotCode, ...]
    largest: tuple[Tensor | None, ...]
    param: ParamCode
    remainder: Tensor | None
    seed: int
    number: int


def coding_of(
    param: Tensor, slots: int, storage: str | None, precision: str | None, min_8bit_size: int
) -> StateCoding | None:
    """How a parameter's state is stored.

    Args:
        param: The parameter.
        slots: How many state tensors its rule has.
        storage: Of the state: None, ``fp32``, ``bf16`` or ``8bit``.
        precision: Of the parameter, where it is bf16: None, ``stochastic``, ``kahan``, ``master``.
        min_8bit_size: Parameters of fewer elements have fp32 instead of 8 bits.

    Returns:
        None where all is in the parameter's dtype, as it is for parameters in double precision,
        complex ones, and those that do not fill their memory.

    Raises:
        ValueError: The names are none of these.
    """
    # Lists, in which anything may be looked up, hashable or not.
    if storage not in list(STORAGES):
        raise ValueError(f"state_storage must be one of {list(STORAGES)}, got {storage!r}")
    if precision not in list(PRECISIONS):
        raise ValueError(f"param_precision must be one of {list(PRECISIONS)}, got {precision!r}")
    if storage is None and precision is None:
        return None
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not is_dense(param):
        return None
    code = PRECISIONS[precision] if param.dtype is torch.bfloat16 else ParamCode.ROUNDED
    slot = STORAGES[storage]
    if slot is SlotCode.AS_PARAMETER and code is ParamCode.MASTER:
        slot = SlotCode.FLOAT32
    if slot is SlotCode.BLOCKWISE8 and param.numel() < min_8bit_size:
        slot = SlotCode.FLOAT32
    if slot is not SlotCode.AS_PARAMETER and DTYPES[slot] is param.dtype:
        slot = SlotCode.AS_PARAMETER
    if slot is SlotCode.AS_PARAMETER and code is ParamCode.ROUNDED:
        return None
    return StateCoding((slot,) * slots, code)


def native_codes(coding: StateCoding | None, dtype: torch.dtype) -> tuple[SlotCode, ParamCode]:
    """How a card's kernels are told: all slots alike, AS_PARAMETER where nothing is coded."""
    if coding is None:
        return SlotCode.AS_PARAMETER, ParamCode.ROUNDED
    code = coding.slots[0] if coding.slots else SlotCode.FLOAT32
    if code is SlotCode.AS_PARAMETER:
        code = SlotCode.FLOAT32 if dtype is torch.float32 else SlotCode.BFLOAT16
    return code, coding.param


def largest_key(key: str) -> str:
    """The state that has the largest magnitudes of a state tensor's blocks, fp32."""
    return f"{key}_largest"


def state_keys(keys: Sequence[str], coding: StateCoding) -> tuple[str, ...]:
    """Everything that the state of a parameter has, from the keys of its rule's slots."""
    blocks = [
        largest_key(key)
        for key, code in zip(keys, coding.slots, strict=True)
        if code is SlotCode.BLOCKWISE8
    ]
    remainder = [REMAINDERS[coding.param][0]] if coding.param in REMAINDERS else []
    return ("step", *keys, *blocks, *remainder)


def coded_keys(keys: Sequence[str]) -> list[str]:
    """Everything that torch would cast to the parameter's dtype, however state is stored."""
    return [*keys, *map(largest_key, keys), *[name for name, _ in REMAINDERS.values()]]


def is_coded(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state has what torch knows nothing of."""
    remainders = [name for name, _ in REMAINDERS.values()]
    return any(key.endswith(largest_key("")) or key in remainders for key in state)


def add_missing(
    state: dict[str, Any],
    keys: Sequence[str],
    param: Tensor,
    coding: StateCoding,
    counter_device: torch.device,
) -> list[str]:
    """Makes what the state of a parameter lacks, zeros, and returns its keys.

    Where there is no moment yet, the next step is the first one. Steps are counted on
    ``counter_device``.
    """
    made: list[str] = []

    def add(key: str, tensor: Tensor) -> None:
        state[key] = tensor
        made.append(key)

    is_first = bool(keys) and all(state.get(key) is None for key in keys)
    if is_first or "step" not in state:
        add("step", torch.zeros((), dtype=torch.float32, device=counter_device))
    for key, code in zip(keys, coding.slots, strict=True):
        if state.get(key) is None:
            add(key, torch.zeros_like(param, dtype=DTYPES.get(code, param.dtype)))
            if code is SlotCode.BLOCKWISE8:
                blocks = -(-param.numel() // BLOCK)
                add(largest_key(key), torch.zeros(blocks, device=param.device))
    if coding.param in REMAINDERS:
        name, dtype = REMAINDERS[coding.param]
        if name not in state:
            add(name, torch.zeros_like(param, dtype=dtype))
    return made


def bring_to(
    state: dict[str, Any],
    keys: Sequence[str],
    param: Tensor,
    coding: StateCoding | None,
    rule: str,
    counter_device: torch.device,
) -> None:
    """Changes the way in which a parameter's state is stored, in place, where it is another.

    A remainder of another kind than the parameter's is dropped. Steps that have not been counted
    are from now on, on ``counter_device``.
    """
    kept, _ = REMAINDERS.get(coding.param, ("", None)) if coding is not None else ("", None)
    for name, _ in REMAINDERS.values():
        if name != kept:
            state.pop(name, None)
    if coding is not None and "step" not in state:
        state["step"] = torch.ones((), dtype=torch.float32, device=counter_device)  # not the first
    codes = coding.slots if coding is not None else (SlotCode.AS_PARAMETER,) * len(keys)
    for key, code, positive in zip(keys, codes, positive_slots(rule), strict=True):
        tensor = state.get(key)
        blocks = state.get(largest_key(key))
        dtype = DTYPES.get(code, param.dtype)
        if tensor is None or tensor.is_complex() or not is_dense(param):
            continue
        if tensor.dtype == dtype and (coding is None or tensor.stride() == param.stride()):
            continue
        values = tensor
        if blocks is not None:
            values = torch.empty_like(tensor, dtype=torch.float32)
            decoded = decode_blocks(in_memory_order(tensor), blocks, positive)
            in_memory_order(values).copy_(decoded)
            del state[largest_key(key)]
        state[key] = torch.empty_like(param, dtype=dtype)
        if code is SlotCode.BLOCKWISE8:
            alike = torch.empty_like(param, dtype=torch.float32).copy_(values)
            bytes_, largest = encode_blocks(in_memory_order(alike), positive)
            in_memory_order(state[key]).copy_(bytes_)
            state[largest_key(key)] = largest
        else:
            state[key].copy_(values)


def is_dense(param: Tensor) -> bool:
    """Whether elements fill their memory, each in a place of its own."""
    return torch.empty_like(param, device="meta").stride() == param.stride()


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor's elements as they lie, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def positive_slots(rule: str) -> list[bool]:
    """Which of a rule's slots are never negative."""
    slots, _, positive = _native_cpu.update_rules[rule]
    return [bool(positive >> slot & 1) for slot in range(slots)]


class ByteCode(NamedTuple):
    """Numbers relative to the largest of their block, with four bits of exponent.

    Attributes:
        shift: Bits of fp32 that are cut off: what is left has three bits of mantissa beside a sign,
            or four for state that is never negative.
        bits: Those of a code without its sign.
    """

    shift: int
    bits: int


# Added before and taken away after: it makes of the smallest codes equal steps from zero on.
OFFSET = 2.0**-15
SIGNED, POSITIVE = ByteCode(20, 127), ByteCode(19, 255)
BASE = 112 << 23  # the bits of OFFSET
HALF = 1 << 15  # a chance that rounds to the nearest
GOLDEN_TURN = 40503  # of 2^16


def _blocks(values: Tensor) -> Tensor:
    missing = -values.numel() % BLOCK
    return torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK)


def encode_blocks(
    values: Tensor, positive: bool, chance: Tensor | int = HALF
) -> tuple[Tensor, Tensor]:
    """Bytes, and the largest magnitude of each block.

    Args:
        values: fp32 ``[elements]``.
        positive: Whether none is negative.
        chance: For each element a number below 2^16: codes are rounded up where it carries.
    """
    code = POSITIVE if positive else SIGNED
    blocks = _blocks(values.float())
    largest = blocks.abs().amax(1) + (blocks * 0).sum(1)  # a NaN for a NaN or an infinity
    scale = torch.where(largest < SMALLEST, 0, 1 / largest).unsqueeze(1)
    relative = blocks.abs().double() * scale + OFFSET
    relative = relative.float().reshape(-1)[: values.numel()]  # rounded once, as kernels do
    steps = (relative.view(torch.int32).long() + (chance << code.shift - 16) - BASE) >> code.shift
    codes = steps & code.bits  # but for a block with a NaN there is nothing beyond
    # A second moment of zero beside a first one would be a step without bounds.
    codes = codes.clamp(min=1) if positive else codes | torch.signbit(values).long() << 7
    return codes.to(torch.uint8), largest


def decode_blocks(bytes_: Tensor, largest: Tensor, positive: bool) -> Tensor:
    """The way back: fp32 ``[elements]``."""
    code = POSITIVE if positive else SIGNED
    steps = bytes_.to(torch.int32) & code.bits
    values = ((steps << code.shift) + BASE).view(torch.float32) - OFFSET
    if not positive:
        values = torch.where(bytes_ > code.bits, -values, values)
    return (_blocks(values) * largest.unsqueeze(1)).reshape(-1)[: bytes_.numel()]


def bf16_by_chance(values: Tensor, chance: Tensor) -> Tensor:
    """fp32 rounded to a bf16 next to it: up where 16 random bits and the lower half carry."""
    bits = values.float().view(torch.int32).long() + chance
    rounded = (bits & 0xFFFF0000).to(torch.int32).view(torch.float32).bfloat16()
    return torch.where(values.isnan(), values.bfloat16(), rounded)


def with_remainder(param: Tensor, code: ParamCode, remainder: Tensor | None) -> Tensor:
    """What a parameter and its remainder are together, fp32.

    A remainder that is not that of the parameter, which somebody has set since, is left out where
    it shows: beside a zero, or where it is more than rounding to the parameter can have lost.
    """
    own = param.float()
    if remainder is None:
        return own
    if code is ParamCode.KAHAN:
        lost = remainder.float()
        return own + torch.where(lost.abs() * 256 > own.abs(), 0, lost)
    bits = param.view(torch.int16).to(torch.int32) << 16
    whole = (bits + remainder.to(torch.int32)).view(torch.float32)
    return torch.where(whole.isnan(), own, whole)


def split(values: Tensor, code: ParamCode) -> tuple[Tensor, Tensor]:
    """A bf16 parameter and its remainder from fp32."""
    param = _nearest_bf16(values)
    if code is ParamCode.KAHAN:
        return param, _nearest_bf16(values - param.float())
    upper = param.view(torch.int16).long() << 16
    lower = (values.view(torch.int32).long() - upper).to(torch.int16)
    return param, torch.where(values.isnan(), 0, lower).to(torch.int16)


def _nearest_bf16(values: Tensor) -> Tensor:
    """Of two equally near ones the one with the larger magnitude."""
    return bf16_by_chance(values, torch.tensor(HALF))


def read(param: Tensor, slots: Sequence[Tensor], coded: CodedState, rule: str) -> list[Tensor]:
    """A parameter and its state as they are meant: fp32, shaped and laid out as the parameter."""
    values = [torch.empty_like(param, dtype=torch.float32) for _ in range(1 + len(slots))]
    remainder = None if coded.remainder is None else in_memory_order(coded.remainder)
    found = [with_remainder(in_memory_order(param), coded.param, remainder)]
    for slot, largest, positive in zip(slots, coded.largest, positive_slots(rule), strict=True):
        own = in_memory_order(slot)
        found.append(own if largest is None else decode_blocks(own, largest, positive))
    for value, own in zip(values, found, strict=True):
        in_memory_order(value).copy_(own)
    return values


def write(
    param: Tensor,
    slots: Sequence[Tensor],
    values: Sequence[Tensor],
    coded: CodedState,
    rule: str,
    step: int,
) -> None:
    """Stores what ``read`` gave, after a step; ``values`` lie as the parameter does."""
    draws = coded.seed, coded.number, step, param.numel(), param.device
    new_param, *new_slots = [in_memory_order(value).float() for value in values]
    own = in_memory_order(param)
    if coded.param is ParamCode.STOCHASTIC:
        own.copy_(bf16_by_chance(new_param, param_chances(*draws)))
    elif coded.remainder is not None:
        rounded, lost = split(new_param, coded.param)
        own.copy_(rounded)
        in_memory_order(coded.remainder).copy_(lost)
    else:
        own.copy_(new_param)
    chances = state_chances(*draws)
    everything = zip(slots, new_slots, coded.largest, positive_slots(rule), strict=True)
    for slot, value, largest, positive in everything:
        own = in_memory_order(slot)
        if largest is not None:
            bytes_, new_largest = encode_blocks(value, positive, chances)
            own.copy_(bytes_)
            largest.copy_(new_largest)
        elif slot.dtype is torch.bfloat16:
            own.copy_(bf16_by_chance(value, chances))
        else:
            own.copy_(value)


def state_chances(seed: int, number: int, step: int, count: int, device: torch.device) -> Tensor:
    """What rounds the state of a parameter in a step: numbers below 2^16, int64 ``[count]``."""
    return (_random_words(seed, number, step, count, device) >> 16).reshape(-1)[:count]


def param_chances(seed: int, number: int, step: int, count: int, device: torch.device) -> Tensor:
    """The same for the parameter: those that share a word turn it by the golden section."""
    turns = torch.arange(64, device=device).view(64, 1) * GOLDEN_TURN
    words = _random_words(seed, number, step, count, device) + turns
    return (words & 0xFFFF).reshape(-1)[:count]


def _random_words(seed: int, number: int, step: int, count: int, device: torch.device) -> Tensor:
    """Philox numbers of 32 bits: 4096 elements share 64, ``[groups, 64, 64]``."""
    words = torch.empty(1, max(-(-count // 4096), 1) * 64, dtype=torch.int32, device="cpu")
    _native_cpu.random_words(seed, number, step, words)
    return (words[0].to(device).long() & 0xFFFFFFFF).view(-1, 1, 64).expand(-1, 64, -1)

"""The parameters of an optimizer as a plan sees them."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastopt.backends import spread_state, state_codes
from fastopt.backends.contract import (
    AVERAGE,
    PRODUCT,
    Created,
    ParamGroup,
    Refusal,
    SteppedOptimizer,
    UpdateRule,
)
from fastopt.backends.plain_tensors import not_plain, unlike
from fastopt.backends.state_codes import CodedState, StateCoding


class Service(enum.IntEnum):
    """What a plan does for a parameter; the numbers are those of optimizer_plan.h."""

    ELSEWHERE = 0
    SERVED = 1
    WITHOUT_STATE = 2


class PlannedParameter(NamedTuple):
    """A parameter in a plan; what follows the service counts where it is served."""

    param: Tensor
    service: Service
    slots: tuple[Tensor, ...] = ()
    step: Tensor | None = None
    product: Tensor | None = None
    average: Tensor | None = None
    is_new: bool = False
    coding: CodedState | None = None


def make_missing_state(optimizer: SteppedOptimizer, served: Sequence[Sequence[bool]]) -> Created:
    """Makes the state that the marked parameters with gradients lack, averages included.

    Returns:
        What was made: parameters and keys, by the parameter's id, for ``undo_state``.
    """
    created: Created = {}
    for group, marks in zip(optimizer.param_groups, served, strict=True):
        for param, mine in members(group, marks):
            if not mine or param.grad is None:
                continue
            for key in missing_keys(optimizer, group, param):
                made = new_average(param) if key == AVERAGE else optimizer._new_state(key, param)
                optimizer.state[param][key] = made
                created.setdefault(id(param), (param, []))[1].append(key)
    return created


def new_average(param: Tensor) -> Tensor:
    """What a parameter's average is before its first step."""
    return param.detach().clone(memory_format=torch.preserve_format)


def make_coded_state(optimizer: SteppedOptimizer, rules: Sequence[UpdateRule]) -> Created:
    """Makes the state of parameters with gradients that torch would store otherwise.

    State that is there is brought to the way in which it is to be stored now.

    Returns:
        What was made, as ``make_missing_state`` does.
    """
    created: Created = {}
    for group, rule in zip(optimizer.param_groups, rules, strict=True):
        keys = optimizer._state_keys(group)
        for param in group["params"]:
            coding = optimizer._coding(group, param)
            optimizer._has_coded |= coding is not None
            state = optimizer.state.get(param)
            if state and optimizer._has_coded:
                spread_state.bring_to(
                    state, keys, param, coding, rule.name, counter_device(group, param)
                )
            if coding is not None and param.grad is not None:
                state = optimizer.state[param]
                counter = counter_device(group, param)
                if made := spread_state.add_missing(state, keys, param, coding, counter):
                    created[id(param)] = param, made
    return created


def counts_on_device(group: ParamGroup) -> bool:
    """Whether torch counts steps beside the parameters, for graphs and its fused kernels."""
    return bool(group.get("capturable") or group.get("fused"))


def counter_device(group: ParamGroup, param: Tensor) -> torch.device:
    """Where torch counts the steps of a parameter."""
    return param.device if counts_on_device(group) else torch.device("cpu")


def undo_state(optimizer: SteppedOptimizer, param: Tensor, keys: Sequence[str]) -> None:
    """Removes what ``make_missing_state`` made, for a step that did not take place."""
    state = optimizer.state.get(param, {})
    for key in keys:
        state.pop(key, None)
    if not state:
        optimizer.state.pop(param, None)


@contextmanager
def whole_state(optimizer: SteppedOptimizer) -> Iterator[None]:
    """Removes the state that was made in a block that raises.

    Where memory runs out between two tensors, half of a parameter's state is there, and neither
    torch nor we would make the rest.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = {param: set(optimizer.state.get(param, ())) for param in params}
    try:
        yield
    except BaseException:
        for param, there in before.items():
            made = optimizer.state.get(param, {}).keys() - there
            undo_state(optimizer, param, list(made))
        raise


def missing_keys(optimizer: SteppedOptimizer, group: ParamGroup, param: Tensor) -> list[str]:
    """The state tensors that the step of a group needs and the parameter has not got."""
    state = optimizer.state.get(param, {})
    keys = optimizer._state_keys(group)
    coding = optimizer._coding(group, param)
    if coding is not None:
        keys = state_codes.state_keys(keys, coding)
    if optimizer.ema_decay is not None:
        keys += (AVERAGE,)
    return [key for key in keys if state.get(key) is None]


def planned_parameters(
    optimizer: SteppedOptimizer, served: Sequence[Sequence[bool]], created: Created
) -> list[list[PlannedParameter]]:
    """Looks up the state of the parameters marked."""
    numbers = itertools.count(optimizer._first_number)
    return [
        [
            _planned(optimizer, group, param, mine, created, next(numbers))
            for param, mine in members(group, marks)
        ]
        for group, marks in zip(optimizer.param_groups, served, strict=True)
    ]


def members(group: ParamGroup, marks: Sequence[bool]) -> Iterator[tuple[Tensor, bool]]:
    """The parameters of a group with their marks."""
    return zip(group["params"], marks, strict=True)


def _planned(
    optimizer: SteppedOptimizer,
    group: ParamGroup,
    param: Tensor,
    served: bool,
    created: Created,
    number: int,
) -> PlannedParameter:
    if not served:
        return PlannedParameter(param, Service.ELSEWHERE)
    if missing_keys(optimizer, group, param):
        return PlannedParameter(param, Service.WITHOUT_STATE)
    state = optimizer.state.get(param, {})
    keys = optimizer._state_keys(group)
    average = None if optimizer.ema_decay is None else state[AVERAGE]
    _, made = created.get(id(param), (param, []))
    coding = optimizer._coding(group, param)
    return PlannedParameter(
        param,
        Service.SERVED,
        tuple([state[key] for key in keys]),
        state.get("step"),
        state.get(PRODUCT),
        average,
        is_new=any(key != AVERAGE for key in made),
        coding=None if coding is None else _coded(coding, keys, state, optimizer, number),
    )


def _coded(
    coding: StateCoding,
    keys: Sequence[str],
    state: dict[str, Tensor],
    optimizer: SteppedOptimizer,
    number: int,
) -> CodedState:
    name, _ = state_codes.REMAINDERS.get(coding.param, ("", None))
    largest = tuple([state.get(state_codes.largest_key(key)) for key in keys])
    return CodedState(
        coding.slots, largest, coding.param, state.get(name), optimizer.rounding_seed, number
    )


def scalar(value: float | Tensor) -> float | Tensor:
    """A hyperparameter: a number, or a tensor of one element that stays where only a device reads.

    Reading a tensor of an accelerator would wait for it, and cannot be done in a graph's capture.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().reshape(())
    return float(value)


def stays_on_device(optimizer: SteppedOptimizer, verdict: Tensor) -> bool:
    """Whether a gradient scaler's verdict need not be read: steps are counted beside it."""
    return verdict.device.type != "cpu" and all(map(counts_on_device, optimizer.param_groups))


def joined_norm(norms: Sequence[float | Tensor], order: float) -> float | Tensor:
    """The norm of all parts together from the norms of the parts, one of them at least."""
    if len(norms) == 1:
        return norms[0]
    device = next((norm.device for norm in norms if isinstance(norm, Tensor)), "cpu")
    parts = [torch.as_tensor(norm, dtype=torch.float64, device=device) for norm in norms]
    if order == 0:  # how many tensors are not zero: the norm of counts would count the parts
        return torch.stack(parts).sum()
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts), order)
    return norm


def named_refusal(
    optimizer: SteppedOptimizer, group: int, place: int, native_reason: str, shares_memory: bool
) -> Refusal:
    """A native plan's refusal, in the words of ``supports`` where it has some."""
    param = optimizer.param_groups[group]["params"][place]
    assert param.grad is not None
    reason = not_plain("the gradient", param.grad, param.device.type)
    reason = reason or unlike("the gradient", param.grad, param)
    return Refusal(group, place, reason or native_reason, shares_memory)


def bump_versions(written: list[Tensor]) -> None:
    """Tells autograd that tensors have changed; inference tensors do not count."""
    try:
        increment_version(written)
    except RuntimeError:
        increment_version([tensor for tensor in written if not tensor.is_inference()])

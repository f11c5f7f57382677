"""The parameters of an optimizer as a plan sees them."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt.backends.contract import Created, ParamGroup, SteppedOptimizer


class Service(enum.IntEnum):
    """What a plan does for a parameter; the numbers are those of optimizer_plan.h."""

    ELSEWHERE = 0
    SERVED = 1
    WITHOUT_STATE = 2


class PlannedParameter(NamedTuple):
    """A parameter in a plan; the last three fields count where it is served."""

    param: Tensor
    service: Service
    slots: tuple[Tensor, ...] = ()
    step: Tensor | None = None
    is_new: bool = False


def make_missing_state(optimizer: SteppedOptimizer, served: Sequence[Sequence[bool]]) -> Created:
    """Makes zeros for the state that the marked parameters with gradients lack.

    Returns:
        What was made: parameters and keys, by the parameter's id, for ``undo_state``.
    """
    created: Created = {}
    for group, marks in zip(optimizer.param_groups, served, strict=True):
        for param, mine in members(group, marks):
            if not mine or param.grad is None:
                continue
            for key in missing_keys(optimizer, group, param):
                zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
                optimizer.state[param][key] = zeros
                created.setdefault(id(param), (param, []))[1].append(key)
    return created


def undo_state(optimizer: SteppedOptimizer, param: Tensor, keys: Sequence[str]) -> None:
    """Removes what ``make_missing_state`` made, for a step that did not take place."""
    state = optimizer.state.get(param, {})
    for key in keys:
        state.pop(key, None)
    if not state:
        optimizer.state.pop(param, None)


def missing_keys(optimizer: SteppedOptimizer, group: ParamGroup, param: Tensor) -> list[str]:
    """The state tensors that the group's rule needs and the parameter has not got."""
    state = optimizer.state.get(param, {})
    return [key for key in optimizer._state_keys(group) if state.get(key) is None]


def planned_parameters(
    optimizer: SteppedOptimizer, served: Sequence[Sequence[bool]], created: Created
) -> list[list[PlannedParameter]]:
    """Looks up the state of the parameters marked."""
    return [
        [_planned(optimizer, group, param, mine, created) for param, mine in members(group, marks)]
        for group, marks in zip(optimizer.param_groups, served, strict=True)
    ]


def members(group: ParamGroup, marks: Sequence[bool]) -> Iterator[tuple[Tensor, bool]]:
    """The parameters of a group with their marks."""
    return zip(group["params"], marks, strict=True)


def _planned(
    optimizer: SteppedOptimizer, group: ParamGroup, param: Tensor, served: bool, created: Created
) -> PlannedParameter:
    if not served:
        return PlannedParameter(param, Service.ELSEWHERE)
    if missing_keys(optimizer, group, param):
        return PlannedParameter(param, Service.WITHOUT_STATE)
    state = optimizer.state.get(param, {})
    slots = tuple([state[key] for key in optimizer._state_keys(group)])
    return PlannedParameter(param, Service.SERVED, slots, state.get("step"), id(param) in created)

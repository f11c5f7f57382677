"""The parameters of an optimizer as a plan sees them."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt.backends.contract import ParamGroup, SteppedOptimizer


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


def planned_parameters(
    optimizer: SteppedOptimizer, served: Sequence[Sequence[bool]]
) -> list[list[PlannedParameter]]:
    """Looks up, and makes where it is missing, the state of the parameters marked."""
    return [
        [_planned(optimizer, group, param, mine) for param, mine in members(group, marks)]
        for group, marks in zip(optimizer.param_groups, served, strict=True)
    ]


def members(group: ParamGroup, marks: Sequence[bool]) -> Iterator[tuple[Tensor, bool]]:
    """The parameters of a group with their marks."""
    return zip(group["params"], marks, strict=True)


def _planned(
    optimizer: SteppedOptimizer, group: ParamGroup, param: Tensor, served: bool
) -> PlannedParameter:
    if not served:
        return PlannedParameter(param, Service.ELSEWHERE)
    keys = optimizer._state_keys(group)
    state = optimizer.state.get(param, {})
    missing = [key for key in keys if state.get(key) is None]
    if missing and param.grad is None:
        return PlannedParameter(param, Service.WITHOUT_STATE)
    for key in missing:
        state = optimizer.state[param]
        state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    slots = tuple([state[key] for key in keys])
    return PlannedParameter(param, Service.SERVED, slots, state.get("step"), bool(missing))

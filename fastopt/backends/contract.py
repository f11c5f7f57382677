"""What an operator asks of a backend, and what a backend answers."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

ParamGroup = dict[str, Any]

# State made for a step that is still to come: parameter and keys, by the parameter's id.
Created = dict[int, tuple[Tensor, list[str]]]


class WeightDecay(enum.IntEnum):
    """How a parameter is pulled towards zero; the numbers are those of core/update_rules.h."""

    L2 = 0  # gradient += decay * parameter
    DECOUPLED = 1  # parameter *= decay, which is 1 - lr * weight_decay


class UpdateRule(NamedTuple):
    """A row of ``csrc/core/update_rules.h`` with its numbers for one step of one group.

    ``hyperparameters`` come in the order of the functor's own struct.
    """

    name: str
    weight_decay: WeightDecay
    decay: float
    maximize: bool
    hyperparameters: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ParameterRequest:
    """May a backend step this parameter?

    Attributes:
        param: The parameter.
        grad: Its gradient, or None where the answer should hold for any ordinary one.
        slots: The state tensors that exist, in the order of the rule's slots.
        step: What counts its steps, where the rule keeps it.
        rule: The update rule's name.
        group: The parameter group, for its flags.
    """

    param: Tensor
    grad: Tensor | None
    slots: tuple[Tensor, ...]
    step: Any
    rule: str
    group: ParamGroup


class SteppedOptimizer(Protocol):
    """The side of an optimizer that the operator and its backends see."""

    param_groups: list[ParamGroup]
    state: Any
    defaults: dict[str, Any]
    _backend: str | None
    _plan: Any

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        """The rule of a group with its present numbers."""

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        """The keys of the state tensors, in the order of the rule's slots."""

    def _prepare(self, group: ParamGroup) -> None:
        """Runs stock's checks of the gradients and makes the state that stock makes lazily."""

    def _torch_step(self, group: ParamGroup) -> None:
        """Steps a group with torch's own implementation."""


class Refusal(NamedTuple):
    """A gradient that a plan does not take this time."""

    group: int
    place: int
    reason: str


class OptimizerPlan(Protocol):
    """What a backend keeps between the steps of one optimizer, but for the optimizer itself.

    A reference back would keep a dropped optimizer's state alive until the garbage collector runs.
    """

    def collect(self, optimizer: SteppedOptimizer, unscaling: bool) -> Sequence[Refusal] | None:
        """Fetches the gradients; with ``unscaling`` they are going to be written. Changes nothing.

        Returns:
            The gradients that the backend does not take this time, or None where the plan no longer
            describes the optimizer.
        """

    def run(
        self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], unscale: float
    ) -> None:
        """Steps what ``collect`` fetched, the gradients multiplied by ``unscale`` first."""

    def release(self) -> None:
        """Drops what ``collect`` fetched."""


class Backend(Protocol):
    """One implementation of the operators."""

    name: str

    def supports(self, request: ParameterRequest) -> str | None:
        """None where the backend takes the request, otherwise the reason in words."""

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> OptimizerPlan:
        """Makes a plan for the parameters marked, by group and index.

        ``created`` has, by id, the parameters whose state was made for this step.
        """

"""The operator ``optimizer_step``: shares the parameters out to backends and steps them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastopt.backends import registry
from fastopt.backends.contract import (
    OptimizerPlan,
    ParameterRequest,
    ParamGroup,
    Refusal,
    SteppedOptimizer,
    UpdateRule,
)
from fastopt.backends.stock import TorchPlan


def optimizer_step(optimizer: SteppedOptimizer) -> None:
    """Steps every parameter that has a gradient.

    Honours torch's protocol for gradient scalers: with a nonzero ``found_inf`` nothing is stepped
    or counted; gradients are divided by ``grad_scale`` and left so.

    Raises:
        RuntimeError: The backend that the user named does not take a parameter or its gradient.
            Besides, whatever stock raises. Nothing has been changed then.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and float(found_inf) != 0:
        for group in optimizer.param_groups:
            optimizer._prepare(group)
        return
    grad_scale = getattr(optimizer, "grad_scale", None)
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    if unscale != 1:
        _make_gradients_writable(optimizer)
    rules = tuple([optimizer._update_rule(group) for group in optimizer.param_groups])

    plan = optimizer._plan
    if plan is None or not plan.collect(optimizer, rules, unscale):
        plan = optimizer._plan = StepPlan(optimizer, rules)
        if not plan.collect(optimizer, rules, unscale):
            raise RuntimeError("the optimizer changed while its step was being planned")
    plan.run(optimizer, rules, unscale)


def _make_gradients_writable(optimizer: SteppedOptimizer) -> None:
    """Unscaling writes gradients: where elements may share memory, each gets its own."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            grad = param.grad
            if grad is None or grad.layout is not torch.strided:
                continue
            if torch._debug_has_internal_overlap(grad) != 0:
                param.grad = grad.clone(memory_format=torch.contiguous_format)


class StepPlan:
    """Which backend steps which parameter, and what each backend keeps between steps."""

    def __init__(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...]) -> None:
        self._choice = (optimizer._backend, registry.context_choice())
        self._rule_names = [rule.name for rule in rules]
        self._this_step: list[OptimizerPlan] = []
        requested = registry.requested(optimizer._backend)
        self._falls_back = requested == "auto"

        chosen = [
            [registry.choose(request, requested) for request in requests(optimizer, group)]
            for group in optimizer.param_groups
        ]
        for group in optimizer.param_groups:
            optimizer._prepare(group)
        backends = dict.fromkeys(backend for group in chosen for backend in group)
        # Torch's part comes first: it may raise, and no kernel has run then.
        self._parts = [
            backend.plan_optimizer_step(optimizer, [[b is backend for b in g] for g in chosen])
            for backend in sorted(backends, key=lambda backend: backend.name != "torch")
        ]

    def collect(
        self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], unscale: float
    ) -> bool:
        """Fetches the gradients of a step. False: the optimizer is no longer as planned."""
        if self._choice != (optimizer._backend, registry.context_choice()):
            return False
        if self._rule_names != [rule.name for rule in rules]:
            return False
        self._this_step = []
        refusals: list[Refusal] = []
        for part in self._parts:
            refused = part.collect(optimizer, unscale != 1)
            if refused is None:
                self._release()
                return False
            refusals += refused
        if refusals:
            self._hand_to_torch(optimizer, refusals)
        self._this_step += self._parts
        return True

    def run(
        self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], unscale: float
    ) -> None:
        """Steps what ``collect`` fetched."""
        try:
            for part in self._this_step:
                part.run(optimizer, rules, unscale)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        for part in self._parts:
            part.release()

    def _hand_to_torch(self, optimizer: SteppedOptimizer, refusals: list[Refusal]) -> None:
        groups = optimizer.param_groups
        marks = [[False] * len(group["params"]) for group in groups]
        for group, place, reason in refusals:
            label = registry.label(groups[group]["params"][place])
            if not self._falls_back:
                self._release()
                raise RuntimeError(
                    f"backend {registry.requested(optimizer._backend)!r} "
                    f"cannot step {label}: {reason}"
                )
            registry.log_fall_through(reason, "torch", label)
            marks[group][place] = True
        self._this_step.append(TorchPlan(optimizer, marks))


def requests(optimizer: SteppedOptimizer, group: ParamGroup) -> Iterator[ParameterRequest]:
    """What the step of a group asks of a backend, parameter by parameter."""
    rule = optimizer._update_rule(group).name
    keys = optimizer._state_keys(group)
    for param in group["params"]:
        state = optimizer.state.get(param, {})
        slots = tuple([state[key] for key in keys if isinstance(state.get(key), Tensor)])
        yield ParameterRequest(param, param.grad, slots, state.get("step"), rule, group)

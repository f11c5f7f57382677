"""The operator ``optimizer_step``: shares the parameters out to backends and steps them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastopt.backends import registry
from fastopt.backends.contract import (
    AVERAGE,
    PRODUCT,
    WHOLE_RULES,
    OptimizerPlan,
    ParameterRequest,
    ParamGroup,
    Refusal,
    SteppedOptimizer,
    Tail,
    UpdateRule,
    step_of,
)
from fastopt.backends.planning import (
    joined_norm,
    make_coded_state,
    make_missing_state,
    stays_on_device,
    undo_state,
    whole_state,
)
from fastopt.backends.spread_state import local_of, takes_codes
from fastopt.backends.state_codes import STORAGE_OPTIONS
from fastopt.backends.stock import TorchPlan, zero_gradients
from fastopt.ops.grad_norm import clip_coefficient, refuse_nonfinite
from fastopt.ops.local_shards import plan_step


@torch._disable_dynamo  # type: ignore[attr-defined]
def optimizer_step(optimizer: SteppedOptimizer) -> None:
    """Steps every parameter that has a gradient, and does what its options say before and after.

    Honours torch's protocol for gradient scalers: with a nonzero ``found_inf`` nothing is stepped
    or counted; gradients are divided by ``grad_scale`` and left so.

    Raises:
        RuntimeError: The backend that the user named does not take a parameter or its gradient; the
            norm is not finite and ``error_if_nonfinite`` is set. Besides, whatever stock raises. No
            parameter and no state has been changed then.
    """
    if step_is_skipped(optimizer):
        _skip(optimizer)
        return
    unscale = _unscale_factor(optimizer)
    rules = tuple([optimizer._update_rule(group) for group in optimizer.param_groups])
    writing = isinstance(unscale, Tensor) or unscale != 1 or _changes_gradients(optimizer)

    found_inf = getattr(optimizer, "found_inf", None)
    plan = optimizer._plan
    if plan is None or not plan.collect(optimizer, rules, writing):
        if found_inf is not None and float(found_inf) != 0:
            _skip(optimizer)  # what a first step is must not be settled by one that is skipped
            return
        found_inf = None
        plan = optimizer._plan = None  # frees the state that only the old plan holds
        plan = StepPlan(optimizer, rules)
        if not plan.collect(optimizer, rules, writing):
            raise RuntimeError("the optimizer changed while its step was being planned")
        optimizer._plan = plan
    plan.run(optimizer, rules, unscale, found_inf)
    optimizer._count_step()


def _skip(optimizer: SteppedOptimizer) -> None:
    """What is left of a step that a gradient scaler skips."""
    with whole_state(optimizer):
        for group in optimizer.param_groups:
            if all(optimizer._coding(group, param) is None for param in group["params"]):
                optimizer._prepare(group)  # stock's: state in the parameter's dtype
    if optimizer.zero_grad_after_step:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        zero_gradients([param for param in params if param.grad is not None])


def traced_step(optimizer: SteppedOptimizer) -> None:
    """The step in torch's operations alone, for ``torch.compile``.

    Raises:
        RuntimeError: State is stored otherwise than in the parameter's dtype.
    """
    for name in STORAGE_OPTIONS:
        values = [getattr(optimizer, name), *[g.get(name) for g in optimizer.param_groups]]
        if any(value is not None for value in values):
            raise RuntimeError(f"{name} does not go into torch.compile: step outside of it")
    begins = averages_begin(optimizer)
    everything = [[True] * len(group["params"]) for group in optimizer.param_groups]
    plan = TorchPlan(optimizer, everything)
    plan.run(optimizer, (), _tail(optimizer, [plan], 1.0, begins))
    optimizer._averages_began = optimizer.ema_decay is not None
    optimizer._count_step()


def averages_begin(optimizer: SteppedOptimizer) -> bool:
    """Whether the next step is the first one that is averaged, which copies."""
    kept = any(AVERAGE in state for state in optimizer.state.values())
    return not (kept or optimizer._averages_began)


PLAIN = Tail()


def _changes_gradients(optimizer: SteppedOptimizer) -> bool:
    return (
        optimizer.max_grad_norm is not None
        or optimizer.clip_value is not None
        or optimizer.zero_grad_after_step
    )


def _tail(
    optimizer: SteppedOptimizer,
    parts: Sequence[OptimizerPlan],
    unscale: float | Tensor,
    averages_begin: bool,
    found_inf: Tensor | None = None,
) -> Tail:
    """Measures the gradients where they are to be clipped by norm, and sums the options up.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.
    """
    plain = not _changes_gradients(optimizer) and optimizer.ema_decay is None
    if plain and found_inf is None and not isinstance(unscale, Tensor) and unscale == 1:
        return PLAIN
    scale: float | Tensor = unscale
    if optimizer.max_grad_norm is not None:
        order = float(optimizer.norm_type)
        norms = [part.grad_norm(optimizer, order) for part in parts]
        there = [norm for norm in norms if norm is not None]
        norm = joined_norm(there, order) if there else 0.0
        if isinstance(norm, Tensor) and isinstance(unscale, Tensor):
            unscale = unscale.to(norm.device)
        if order != 0:
            norm = norm * unscale
        if optimizer.error_if_nonfinite:
            refuse_nonfinite(norm, order)
        place = norm.device if isinstance(norm, Tensor) else "cpu"
        optimizer.grad_norm = torch.as_tensor(norm, dtype=_norm_dtype(optimizer), device=place)
        scale = unscale * clip_coefficient(optimizer.max_grad_norm, norm)
    decay = optimizer.ema_decay
    return Tail(
        grad_scale=scale,
        clip_value=math.inf if optimizer.clip_value is None else optimizer.clip_value,
        zero_grad=optimizer.zero_grad_after_step,
        average_weight=1.0 if averages_begin or decay is None else 1 - decay,
        found_inf=found_inf,
    )


def _norm_dtype(optimizer: SteppedOptimizer) -> torch.dtype:
    """Of the parameters all together, as torch.nn.utils.clip_grad_norm_ gives it."""
    dtypes = {param.dtype for group in optimizer.param_groups for param in group["params"]}
    dtype: torch.dtype = functools.reduce(torch.promote_types, dtypes).to_real()
    return dtype


def step_is_skipped(optimizer: SteppedOptimizer) -> bool:
    """Whether a gradient scaler has found infinities or NaN, as far as the host is to know."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None or stays_on_device(optimizer, found_inf):
        return False
    return float(found_inf) != 0


def _unscale_factor(optimizer: SteppedOptimizer) -> float | Tensor:
    """What gradients are multiplied by for a gradient scaler; a tensor where the scale is one's."""
    grad_scale = getattr(optimizer, "grad_scale", None)
    if grad_scale is None:
        return 1.0
    if stays_on_device(optimizer, grad_scale):
        factor: Tensor = 1.0 / grad_scale.double()
        return factor
    return 1.0 / float(grad_scale)


def unscale_gradients(optimizer: SteppedOptimizer) -> None:
    """Does a gradient scaler's division now, for those who look at gradients before the step."""
    grad_scale = getattr(optimizer, "grad_scale", None)
    if grad_scale is None:
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        if param.grad is not None and _may_share_elements(param.grad):
            param.grad = param.grad.clone(memory_format=torch.contiguous_format)
    with torch.no_grad():
        factor = 1.0 / float(grad_scale)
        for param in params:
            if param.grad is not None:
                param.grad.mul_(factor)
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _separate_gradients(optimizer: SteppedOptimizer, refusals: Sequence[Refusal]) -> bool:
    """Gives gradients that are to be written memory of their own, where they have none."""
    shared = [refusal for refusal in refusals if refusal.shares_memory]
    for group, place, *_ in shared:
        param = optimizer.param_groups[group]["params"][place]
        param.grad = param.grad.clone(memory_format=torch.contiguous_format)
    return bool(shared)


def _may_share_elements(grad: Tensor) -> bool:
    return grad.layout is torch.strided and torch._debug_has_internal_overlap(grad) != 0


class StepPlan:
    """Which backend steps which parameter, and what each backend keeps between steps."""

    def __init__(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...]) -> None:
        self._key = _key(optimizer, rules)
        self._this_step: list[OptimizerPlan] = []
        requested = registry.requested(optimizer._backend)
        self._falls_back = requested == "auto"

        # Gradients come and go: what is odd about one of them is collect's matter.
        chosen = [
            [registry.choose(request, requested) for request in requests(optimizer, group, rule)]
            for group, rule in zip(optimizer.param_groups, rules, strict=True)
        ]
        self._averages_begin = averages_begin(optimizer)
        with whole_state(optimizer):
            self._created = make_coded_state(optimizer, rules)
            for group in optimizer.param_groups:
                optimizer._prepare(group)
            makes_state = [[backend.name != "torch" for backend in group] for group in chosen]
            for param_id, made in make_missing_state(optimizer, makes_state).items():
                param, keys = self._created.get(param_id, (made[0], []))
                self._created[param_id] = param, keys + made[1]
            backends = dict.fromkeys(backend for group in chosen for backend in group)
            # Torch's part comes first: it may raise, and no kernel has run then.
            self._parts: list[OptimizerPlan] = []
            for backend in sorted(backends, key=lambda backend: backend.name != "torch"):
                marks = [[b is backend for b in group] for group in chosen]
                self._parts += plan_step(backend, optimizer, marks, self._created)

    def collect(
        self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], writing: bool
    ) -> bool:
        """Fetches the gradients of a step. False: the optimizer is no longer as planned."""
        if self._key != _key(optimizer, rules):
            return False
        self._this_step = []
        refusals: list[Refusal] = []
        try:
            for part in self._parts:
                refused = part.collect(optimizer, writing)
                if writing and refused and _separate_gradients(optimizer, refused):
                    refused = part.collect(optimizer, writing)
                if refused is None:
                    self._release()
                    return False
                if not isinstance(part, TorchPlan):  # torch steps all that it was given
                    refusals += refused
            if refusals:
                self._hand_to_torch(optimizer, refusals)
        except BaseException:
            self._give_up(optimizer)
            raise
        self._this_step += self._parts
        return True

    def run(
        self,
        optimizer: SteppedOptimizer,
        rules: tuple[UpdateRule, ...],
        unscale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """Steps what ``collect`` fetched, its gradients multiplied by ``unscale``."""
        try:
            begins = self._averages_begin
            tail = _tail(optimizer, self._this_step, unscale, begins, found_inf)
            for part in self._this_step:
                part.run(optimizer, rules, tail)
        except BaseException:
            self._give_up(optimizer)
            raise
        self._created = {}
        self._averages_begin = False
        if optimizer.ema_decay is not None:
            optimizer._averages_began = True

    def _release(self) -> None:
        for part in self._parts:
            part.release()

    def _give_up(self, optimizer: SteppedOptimizer) -> None:
        self._release()
        self._undo(optimizer, list(self._created))

    def _undo(self, optimizer: SteppedOptimizer, param_ids: list[int]) -> None:
        for param_id in param_ids:
            param, keys = self._created.pop(param_id)
            undo_state(optimizer, param, keys)

    def _hand_to_torch(self, optimizer: SteppedOptimizer, refusals: list[Refusal]) -> None:
        groups = optimizer.param_groups
        marks = [[False] * len(group["params"]) for group in groups]
        for group, place, reason, _ in refusals:
            param = groups[group]["params"][place]
            if not self._falls_back or optimizer._coding(groups[group], param) is not None:
                name = registry.requested(optimizer._backend)
                raise RuntimeError(f"backend {name!r} cannot {step_of(param)}: {reason}")
            registry.log_fall_through(reason, "torch", step_of(param))
            marks[group][place] = True
            if id(param) in self._created:  # torch makes the state of a first step itself
                self._undo(optimizer, [id(param)])
        self._this_step.append(TorchPlan(optimizer, marks))


def _key(optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...]) -> list[object]:
    """What the choice of backends hangs on besides the tensors."""
    averages = optimizer.ema_decay is not None
    key: list[object] = [optimizer._backend, registry.context_choice(), averages]
    key += (optimizer.rounding_seed, optimizer.min_8bit_size)
    for group, rule in zip(optimizer.param_groups, rules, strict=True):
        key += (rule.name, group.get("capturable"), group.get("differentiable"))
        key += (group.get(name, getattr(optimizer, name)) for name in STORAGE_OPTIONS)
    return key


def requests(
    optimizer: SteppedOptimizer, group: ParamGroup, rule: UpdateRule, with_gradients: bool = False
) -> Iterator[ParameterRequest]:
    """What the step of a group asks of a backend, parameter by parameter."""
    keys = (*optimizer._state_keys(group), AVERAGE)
    for param in group["params"]:
        state = optimizer.state.get(param, {})
        coding = optimizer._coding(group, param)
        slots = [local_of(state[key]) for key in keys if isinstance(state.get(key), Tensor)]
        if coding is None and optimizer._has_coded:  # the others are brought to it
            slots = [slot for slot in slots if slot.dtype == param.dtype]
        grad = local_of(param.grad) if with_gradients else None
        step, product = state.get("step"), state.get(PRODUCT)
        if rule.name not in WHOLE_RULES and (coding is None or takes_codes(param)):
            param = local_of(param)
        yield ParameterRequest(param, grad, tuple(slots), step, rule.name, group, product, coding)

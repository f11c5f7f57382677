"""Backend ``torch``: stock's own implementation of every operator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastopt.backends.contract import (
    AVERAGE,
    AttentionRequest,
    Created,
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
    ParamGroup,
    Refusal,
    SteppedOptimizer,
    Tail,
    UpdateRule,
)
from fastopt.backends.plain_tensors import is_dtensor
from fastopt.backends.planning import members, new_average

HALVES = (torch.bfloat16, torch.float16)


class TorchBackend:
    """Runs what torch would run. Takes everything; torch raises where it does not."""

    name = "torch"

    def supports(self, request: ParameterRequest) -> str | None:
        """Everything that torch has state for."""
        if request.coding is not None:
            return "torch stores state in the parameter's dtype alone"
        return None

    def supports_lstm(self, request: LstmRequest) -> str | None:
        """Always None."""
        return None

    def supports_attention(self, request: AttentionRequest) -> str | None:
        """What ``torch.nn.functional.scaled_dot_product_attention`` has arguments for."""
        if request.softcap or request.slopes is not None:
            return "torch has neither softcap nor ALiBi"
        if request.sinks is not None:
            return "torch has no sinks"
        if request.query_starts is not None or request.used_keys is not None:
            return "torch has no cu_seqlens and no cache_seqlens"
        square = request.query.size(-2) == request.key.size(-2)
        causal = request.right == 0 and (square or not request.bottom_right)
        if request.left >= 0 or not (causal or request.right < 0):
            return "torch has no window and no causal mask from the bottom right"
        return None

    def supports_linear_cross_entropy(self, request: LinearCrossEntropyRequest) -> str | None:
        """Always None: torch's operations make whatever it has no argument for."""
        return None

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> TorchPlan:
        """Remembers which parameters to step."""
        return TorchPlan(optimizer, served)


class TorchPlan:
    """Steps parameters with torch's functional optimizers, group by group."""

    def __init__(self, optimizer: SteppedOptimizer, served: Sequence[Sequence[bool]]) -> None:
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._served = served

    def collect(self, optimizer: SteppedOptimizer, writing: bool) -> Sequence[Refusal] | None:
        """Torch reads the gradients itself; only the groups are compared."""
        groups = optimizer.param_groups
        if len(groups) != len(self._params):
            return None
        for group, params in zip(groups, self._params, strict=True):
            if len(group["params"]) != len(params):
                return None
            if any(new is not old for new, old in zip(group["params"], params, strict=True)):
                return None
        return list(self._shared_gradients(groups)) if writing else ()

    def _shared_gradients(self, groups: list[ParamGroup]) -> Iterator[Refusal]:
        seen = set()
        for number, (group, marks) in enumerate(zip(groups, self._served, strict=True)):
            for place, (param, mine) in enumerate(members(group, marks)):
                grad = param.grad
                if not mine or grad is None or grad.layout is not torch.strided or not grad.numel():
                    continue
                address = grad.data_ptr()
                if address == 0:  # a wrapper, which keeps its memory elsewhere
                    continue
                if (
                    address in seen
                    or address == param.data_ptr()
                    or torch._debug_has_internal_overlap(grad)
                ):
                    yield Refusal(number, place, "the gradient shares memory", True)
                seen.add(address)

    def grad_norm(self, optimizer: SteppedOptimizer, order: float) -> Tensor | None:
        """Of a sparse gradient, that of its values. In fp32 at least: a scaled half overflows."""
        grads = [_values(param) for param in self._with_gradients(optimizer)]
        if not grads:
            return None
        norms = [
            torch.linalg.vector_norm(
                grad, order, dtype=torch.float32 if grad.dtype in HALVES else None
            )
            for grad in grads
        ]
        # A DTensor's is that of all its parts, and no tensor beside it need be a DTensor.
        norms = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]
        first = norms[0].device
        joined: Tensor = torch.linalg.vector_norm(
            torch.stack([norm.to(first) for norm in norms]), order
        )
        return joined

    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Steps with torch's for-loop, and does what surrounds it with torch's operations."""
        if tail.found_inf is not None and float(tail.found_inf) != 0:
            if tail.zero_grad:
                zero_gradients(self._with_gradients(optimizer))
            return
        averages = self._averages(optimizer)
        for group, marks in zip(optimizer.param_groups, self._served, strict=True):
            params = [p for p, mine in members(group, marks) if mine and p.grad is not None]
            if not params:
                continue
            if tail.changes_gradients:
                _change_gradients(params, tail)
            differentiable = optimizer.defaults.get("differentiable", False)
            with torch.set_grad_enabled(differentiable):
                for part in _safe_groups(group, params):
                    optimizer._torch_step(part)
            if tail.zero_grad:
                zero_gradients(params)
        with torch.no_grad():
            for param, average in averages:
                optimizer.state[param][AVERAGE] = average
                if tail.average_weight == 1:  # lerp_ would make a NaN of an infinity
                    average.copy_(param)
                else:
                    average.lerp_(param, tail.average_weight)

    def _with_gradients(self, optimizer: SteppedOptimizer) -> list[Tensor]:
        return [
            param
            for group, marks in zip(optimizer.param_groups, self._served, strict=True)
            for param, mine in members(group, marks)
            if mine and param.grad is not None
        ]

    def _averages(self, optimizer: SteppedOptimizer) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have an average, or get their first one with this step."""
        if optimizer.ema_decay is None:
            return []
        averages = []
        for group, marks in zip(optimizer.param_groups, self._served, strict=True):
            for param, mine in members(group, marks):
                average = optimizer.state.get(param, {}).get(AVERAGE)
                if mine and (average is not None or param.grad is not None):
                    averages.append((param, new_average(param) if average is None else average))
        return averages

    def release(self) -> None:
        """Nothing was fetched."""


def _values(param: Tensor) -> Tensor:
    """The gradient's elements; what is written to them is written to the gradient."""
    grad = param.grad
    assert grad is not None
    if grad.layout is torch.sparse_coo:
        param.grad = grad = grad.coalesce()
        return grad._values()
    if grad.is_conj() or grad.is_neg():
        param.grad = grad = grad.resolve_conj().resolve_neg()
    return grad


@torch.no_grad()
def _change_gradients(params: list[Tensor], tail: Tail) -> None:
    grads = [_values(param) for param in params]
    scale = tail.grad_scale
    if isinstance(scale, Tensor) or scale != 1:
        for grad in grads:  # torch._foreach_mul_ would round a number to the dtype of halves
            grad.mul_(scale.to(grad.device) if isinstance(scale, Tensor) else scale)
    if tail.clip_value < math.inf:
        for grad in grads:
            real = torch.view_as_real(grad) if grad.is_complex() else grad
            real.clamp_(-tail.clip_value, tail.clip_value)


@torch.no_grad()
def zero_gradients(params: list[Tensor]) -> None:
    """What ``zero_grad(set_to_none=False)`` does."""
    for param in params:
        grad = param.grad
        if grad is not None and grad.requires_grad:
            grad.detach_()
        _values(param).zero_()


def _safe_groups(group: ParamGroup, params: list[Tensor]) -> list[ParamGroup]:
    """The group for these parameters, without stock's fused CPU step: it corrupts strided ones."""
    if not group.get("fused"):
        return [{**group, "params": params}]
    on_cpu = [param for param in params if param.device.type == "cpu"]
    elsewhere = [param for param in params if param.device.type != "cpu"]
    parts = ({**group, "params": on_cpu, "fused": False}, {**group, "params": elsewhere})
    return [part for part in parts if part["params"]]

"""Backend ``torch``: stock's own implementation of every operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastopt.backends.contract import (
    Created,
    ParameterRequest,
    ParamGroup,
    Refusal,
    SteppedOptimizer,
    UpdateRule,
)
from fastopt.backends.planning import members


class TorchBackend:
    """Runs what torch would run. Takes everything; torch raises where it does not."""

    name = "torch"

    def supports(self, request: ParameterRequest) -> str | None:
        """Always None."""
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

    def collect(self, optimizer: SteppedOptimizer, unscaling: bool) -> Sequence[Refusal] | None:
        """Torch reads the gradients itself; only the groups are compared."""
        groups = optimizer.param_groups
        if len(groups) != len(self._params):
            return None
        for group, params in zip(groups, self._params, strict=True):
            if len(group["params"]) != len(params):
                return None
            if any(new is not old for new, old in zip(group["params"], params, strict=True)):
                return None
        return ()

    def run(
        self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], unscale: float
    ) -> None:
        """Unscales the gradients, which torch's for-loop does not, and steps."""
        for group, marks in zip(optimizer.param_groups, self._served, strict=True):
            params = [p for p, mine in members(group, marks) if mine and p.grad is not None]
            if not params:
                continue
            if unscale != 1:
                with torch.no_grad():
                    torch._foreach_mul_([p.grad for p in params if p.grad is not None], unscale)
            differentiable = optimizer.defaults.get("differentiable", False)
            with torch.set_grad_enabled(differentiable):
                for part in _safe_groups(group, params):
                    optimizer._torch_step(part)

    def release(self) -> None:
        """Nothing was fetched."""


def _safe_groups(group: ParamGroup, params: list[Tensor]) -> list[ParamGroup]:
    """The group for these parameters, without stock's fused CPU step: it corrupts strided ones."""
    if not group.get("fused"):
        return [{**group, "params": params}]
    on_cpu = [param for param in params if param.device.type == "cpu"]
    elsewhere = [param for param in params if param.device.type != "cpu"]
    parts = ({**group, "params": on_cpu, "fused": False}, {**group, "params": elsewhere})
    return [part for part in parts if part["params"]]

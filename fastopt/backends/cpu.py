"""Backend ``cpu``: the C++ kernels of ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastopt import _native_cpu
from fastopt.backends.contract import (
    Created,
    ParameterRequest,
    Refusal,
    SteppedOptimizer,
    UpdateRule,
)
from fastopt.backends.planning import planned_parameters

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

# Of tensors as the kernels see them, where a complex one has a dimension more.
MAX_DIMS = 64

# "" where this torch has the interfaces that the kernels read tensors through.
MISSING_IN_TORCH = _native_cpu.initialise(torch)


class CpuBackend:
    """Elementwise updates of all parameters in one parallel region."""

    name = "cpu"

    def supports(self, request: ParameterRequest) -> str | None:
        """Plain tensors on the CPU, of any strides; not what autograd has to record."""
        if MISSING_IN_TORCH:
            return MISSING_IN_TORCH
        if request.rule not in _native_cpu.update_rules:
            return f"no kernel has the update rule {request.rule!r}"
        if request.group.get("differentiable"):
            return "differentiable=True has autograd record the step"
        if request.group.get("capturable"):
            return "capturable=True is for parameters on an accelerator"
        reason = _not_plain("the parameter", request.param)
        if reason is None and request.param.is_inference():
            reason = "the parameter was made in inference mode"
        if reason is None and _may_overlap_itself(request.param):
            reason = "elements of the parameter share memory"
        for slot in request.slots:
            reason = reason or _not_plain("a state tensor", slot)
            if reason is None and _may_overlap_itself(slot):
                reason = "elements of a state tensor share memory"
            if reason is None:
                reason = _unlike("a state tensor", slot, request.param)
        if reason is None and request.step is not None:
            reason = _not_a_counter(request.step)
        if reason is None and request.grad is not None:
            reason = _not_plain("the gradient", request.grad)
            reason = reason or _unlike("the gradient", request.grad, request.param)
        return reason

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> CpuPlan:
        """Reads addresses and layouts once for many steps."""
        planned = planned_parameters(optimizer, served, created)
        return CpuPlan(_native_cpu.OptimizerPlan(optimizer.state, planned))


class CpuPlan:
    """A plan of the native module."""

    def __init__(self, native: _native_cpu.OptimizerPlan) -> None:
        self._native = native

    def collect(self, optimizer: SteppedOptimizer, unscaling: bool) -> Sequence[Refusal] | None:
        """Compares all that the plan knows with the optimizer and fetches the gradients."""
        refused = self._native.collect(optimizer.param_groups, optimizer.state, unscaling)
        if refused is None:
            return None
        return [_refusal(optimizer, *refusal) for refusal in refused]

    def run(
        self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], unscale: float
    ) -> None:
        """Runs the kernels and tells autograd what they wrote."""
        increment_version(self._native.run(rules, unscale, torch.get_num_threads()))

    def release(self) -> None:
        """Drops the gradients."""
        self._native.release()


def _refusal(optimizer: SteppedOptimizer, group: int, place: int, native_reason: str) -> Refusal:
    """In the words of ``supports`` where it has some."""
    param = optimizer.param_groups[group]["params"][place]
    assert param.grad is not None
    reason = _not_plain("the gradient", param.grad) or _unlike("the gradient", param.grad, param)
    return Refusal(group, place, reason or native_reason)


def _not_plain(what: str, tensor: Tensor) -> str | None:
    tensor_type = type(tensor)
    if tensor_type not in (Tensor, torch.nn.Parameter):
        return f"{what} is a {tensor_type.__name__}, a subclass of torch.Tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return f"{what} is inside a torch.func transform"
    if tensor.device.type != "cpu":
        return f"{what} is on {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"{what} has layout {tensor.layout}"
    if tensor.dtype not in DTYPES:
        return f"{what} has dtype {tensor.dtype}"
    if tensor.is_conj() or tensor.is_neg():
        return f"{what} is a lazily conjugated or negated view"
    if tensor._is_zerotensor() or (tensor.numel() and tensor.data_ptr() == 0):
        return f"{what} has no memory"
    if tensor.dim() + tensor.is_complex() > MAX_DIMS:
        return f"{what} has {tensor.dim()} dimensions"
    return None


def _unlike(what: str, tensor: Tensor, param: Tensor) -> str | None:
    if tensor.dtype != param.dtype:
        return f"{what} has dtype {tensor.dtype}, the parameter {param.dtype}"
    if tensor.shape != param.shape:
        return f"{what} has shape {tuple(tensor.shape)}, the parameter {tuple(param.shape)}"
    return None


def _may_overlap_itself(tensor: Tensor) -> bool:
    return _native_cpu.may_overlap_itself(list(tensor.shape), list(tensor.stride()))


def _not_a_counter(step: Any) -> str | None:
    if not isinstance(step, Tensor):
        return f"the step counter is the {type(step).__name__} {step!r}"
    if step.dtype not in (torch.float32, torch.float64) or step.numel() != 1:
        return f"the step counter has dtype {step.dtype} and shape {tuple(step.shape)}"
    return _not_plain("the step counter", step)

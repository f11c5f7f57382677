"""Backend ``cpu``: the C++ kernels of ``csrc/cpu``."""

from __future__ import annotations

import functools
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
    Tail,
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

# By their numbers in core/dtypes.h.
REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

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

    def collect(self, optimizer: SteppedOptimizer, writing: bool) -> Sequence[Refusal] | None:
        """Compares all that the plan knows with the optimizer and fetches the gradients."""
        refused = self._native.collect(optimizer.param_groups, optimizer.state, writing)
        if refused is None:
            return None
        return [_refusal(optimizer, *refusal) for refusal in refused]

    def grad_norm(self, optimizer: SteppedOptimizer, order: float) -> float | None:
        """In double precision."""
        grads = self._native.gradients()
        if not grads:
            return None
        if order != 2 and any(grad.is_complex() for grad in grads):
            return torch.nn.utils.get_total_norm(grads, order).item()
        return self._native.grad_norm(order, torch.get_num_threads())

    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Runs the kernels and tells autograd what they wrote."""
        tail = tail._replace(grad_scale=float(tail.grad_scale))
        bump_versions(self._native.run(rules, tail, torch.get_num_threads()))

    def release(self) -> None:
        """Drops the gradients."""
        self._native.release()


class GradientList:
    """Gradients to be measured and clipped together, as they lie at this moment."""

    def __init__(self, tensors: list[Tensor], of_parameters: bool) -> None:
        self._native = _native_cpu.GradientList(tensors, of_parameters)

    def refusal(self, order: float) -> str | None:
        """Why the kernels do not compute their norm; None where they do."""
        if MISSING_IN_TORCH or self._native.unreadable:
            return MISSING_IN_TORCH or self._native.unreadable
        if order != 2 and self._native.has_complex:
            return f"norms of order {order} of complex gradients are torch's"
        return None

    def norm(self, order: float) -> Tensor:
        """Rounded to the dtype of the gradients, as torch gives it."""
        if not self._native.tensors:
            return torch.tensor(0.0)
        dtypes = [REAL_DTYPES[number] for number in self._native.dtypes]
        norm = self._native.norm(order, torch.get_num_threads())
        return torch.tensor(norm, dtype=functools.reduce(torch.promote_types, dtypes))

    def clip(self, scale: float, clip_value: float) -> bool:
        """Multiplies, then brings elements into ``[-clip_value, clip_value]``, in place.

        Returns:
            False where nothing was done because elements share memory.
        """
        if self._native.unwritable:
            return False
        bump_versions(self._native.clip(scale, clip_value, torch.get_num_threads()))
        return True


def bump_versions(written: list[Tensor]) -> None:
    """Tells autograd that tensors have changed; inference tensors do not count."""
    try:
        increment_version(written)
    except RuntimeError:
        increment_version([tensor for tensor in written if not tensor.is_inference()])


def _refusal(
    optimizer: SteppedOptimizer, group: int, place: int, native_reason: str, shares_memory: bool
) -> Refusal:
    """In the words of ``supports`` where it has some."""
    param = optimizer.param_groups[group]["params"][place]
    assert param.grad is not None
    reason = _not_plain("the gradient", param.grad) or _unlike("the gradient", param.grad, param)
    return Refusal(group, place, reason or native_reason, shares_memory)


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

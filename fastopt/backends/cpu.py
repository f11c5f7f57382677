"""Backend ``cpu``: the C++ kernels of ``csrc/cpu``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends import cpu_attention, cpu_linear_cross_entropy, cpu_lstm
from fastopt.backends.attention_requests import refuse_attention
from fastopt.backends.contract import (
    AttentionRequest,
    Created,
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
    Refusal,
    SteppedOptimizer,
    Tail,
    UpdateRule,
)
from fastopt.backends.linear_cross_entropy_requests import refuse_linear_cross_entropy
from fastopt.backends.lstm_requests import refuse_lstm
from fastopt.backends.plain_tensors import REAL_DTYPES, refuse_request
from fastopt.backends.planning import bump_versions, named_refusal, planned_parameters

# "" where this torch has the interfaces that the kernels read tensors through.
MISSING_IN_TORCH = _native_cpu.initialise(torch)


class CpuBackend:
    """Elementwise updates of all parameters in one parallel region."""

    name = "cpu"
    lstm_forward = staticmethod(cpu_lstm.forward)
    lstm_backward = staticmethod(cpu_lstm.backward)
    attention_forward = staticmethod(cpu_attention.forward)
    attention_backward = staticmethod(cpu_attention.backward)
    linear_cross_entropy_forward = staticmethod(cpu_linear_cross_entropy.forward)
    linear_cross_entropy_backward = staticmethod(cpu_linear_cross_entropy.backward)

    def supports(self, request: ParameterRequest) -> str | None:
        """Plain tensors on the CPU, of any strides; not what autograd has to record."""
        if MISSING_IN_TORCH:
            return MISSING_IN_TORCH
        if request.rule not in _native_cpu.update_rules:
            return f"no kernel has the update rule {request.rule!r}"
        if request.group.get("capturable"):
            return "capturable=True is for parameters on an accelerator"
        return refuse_request(request, "cpu")

    def supports_lstm(self, request: LstmRequest) -> str | None:
        """Plain tensors of one dtype on the CPU, of sizes that fit each other."""
        return MISSING_IN_TORCH or refuse_lstm(request, "cpu")

    def supports_attention(self, request: AttentionRequest) -> str | None:
        """Plain tensors of one dtype on the CPU."""
        return MISSING_IN_TORCH or refuse_attention(request, "cpu", REAL_DTYPES)

    def supports_linear_cross_entropy(self, request: LinearCrossEntropyRequest) -> str | None:
        """Plain tensors on the CPU, of sizes that fit each other."""
        return MISSING_IN_TORCH or refuse_linear_cross_entropy(request, "cpu")

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
        return [named_refusal(optimizer, *refusal) for refusal in refused]

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
        if tail.found_inf is not None and float(tail.found_inf) != 0:
            if tail.zero_grad:
                torch._foreach_zero_(self._native.gradients())
            self._native.release()
            return
        scale, clip_value, zero_grad, average_weight, _ = tail
        numbers = float(scale), clip_value, zero_grad, average_weight
        bump_versions(self._native.run(rules, numbers, torch.get_num_threads()))

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
        if self._native.has_empty and (order < 0 or order == math.inf):
            return f"norms of order {order} of tensors without elements are torch's"
        return None

    def norm(self, order: float) -> Tensor:
        """Rounded to the dtype of the gradients, as torch gives it."""
        if not self._native.tensors:
            return torch.tensor(0.0, device="cpu")
        dtypes = [REAL_DTYPES[number] for number in self._native.dtypes]
        norm = self._native.norm(order, torch.get_num_threads())
        return torch.tensor(norm, dtype=functools.reduce(torch.promote_types, dtypes), device="cpu")

    def clip(self, scale: float, clip_value: float) -> bool:
        """Multiplies, then brings elements into ``[-clip_value, clip_value]``, in place.

        Returns:
            False where nothing was done because elements share memory.
        """
        if self._native.unwritable:
            return False
        bump_versions(self._native.clip(scale, clip_value, torch.get_num_threads()))
        return True

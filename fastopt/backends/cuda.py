"""Backend ``cuda``: the CUDA kernels of ``csrc/cuda``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import cuda_attention, cuda_linear_cross_entropy, cuda_lstm, selfcheck
from fastopt.backends.card_plan import CardPlan, CardPlans
from fastopt.backends.contract import (
    AttentionRequest,
    Created,
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
    SteppedOptimizer,
)
from fastopt.backends.cuda_context import card_identity
from fastopt.backends.plain_tensors import refuse_request


class CudaBackend:
    """Elementwise updates of all parameters of a card in a launch or two.

    Args:
        native: The native module, or why there is none.
        device: The device type whose tensors it takes. The host simulator takes the CPU's.
    """

    name = "cuda"

    def __init__(self, native: ModuleType | str, device: str = "cuda") -> None:
        self.native = None if isinstance(native, str) else native
        self.device = device
        self._absent = native if isinstance(native, str) else ""

    @functools.cached_property
    def missing(self) -> str:
        """Why the module cannot be used, or "".

        Asked for at first use: it initialises CUDA, and a process that has done so cannot be forked
        and no longer heeds CUDA_VISIBLE_DEVICES.
        """
        if self.native is None:
            return self._absent
        reason: str = self.native.unavailable() or self.native.initialise(torch)
        return reason

    def supports(self, request: ParameterRequest) -> str | None:
        """Plain tensors on a card, of any strides; not what autograd has to record."""
        if request.param.device.type != self.device:
            return f"the parameter is on {request.param.device}"
        if self.native is None or self.missing:
            return self.missing
        if request.rule not in self.native.update_rules:
            return f"no kernel has the update rule {request.rule!r}"
        reason = refuse_request(request, self.device)
        return reason or selfcheck.refusal("optimizer_step", self, request.param.device)

    def identity(self, device: torch.device) -> dict[str, str]:
        """The card, and what its kernels' results could hang on."""
        assert self.native is not None and self.native.__file__ is not None
        build = Path(self.native.__file__).stat()
        return {
            **card_identity(device),
            "driver": str(self.native.driver_version()),
            "build": f"{build.st_size} bytes of {build.st_mtime_ns}",
        }

    def supports_attention(self, request: AttentionRequest) -> str | None:
        """Plain tensors of fp32, bf16 or fp16 on a card, of up to 256 features."""
        if self.native is None:
            return self._absent
        reason = cuda_attention.refuse(self.native, request, self.device)
        return reason or self._unproven("attention", request.device)

    def attention_forward(
        self, request: AttentionRequest, inference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp; nothing hangs on ``inference``."""
        return cuda_attention.forward(self._usable_native(), request)

    def attention_backward(
        self,
        request: AttentionRequest,
        output_gradient: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        bias_wanted: bool,
        sinks_wanted: bool,
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key, value, bias and sinks; empty where the last are not wanted."""
        return cuda_attention.backward(
            self._usable_native(),
            request,
            output_gradient,
            output,
            logsumexp,
            bias_wanted,
            sinks_wanted,
        )

    def supports_linear_cross_entropy(self, request: LinearCrossEntropyRequest) -> str | None:
        """Plain tensors on a card."""
        if self.native is None:
            return self._absent
        reason = cuda_linear_cross_entropy.refuse(self.native, request, self.device)
        return reason or self._unproven("linear_cross_entropy", request.device)

    def linear_cross_entropy_forward(
        self, request: LinearCrossEntropyRequest, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss and gradients; see ``linear_cross_entropy``."""
        return cuda_linear_cross_entropy.forward(self._usable_native(), request, wanted)

    def linear_cross_entropy_backward(
        self, request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients."""
        native = self._usable_native()
        return cuda_linear_cross_entropy.backward(native, request, gradient, wanted)

    def supports_lstm(self, request: LstmRequest) -> str | None:
        """Plain tensors on a card; inside a graph's capture no packed sequences."""
        if self.native is None:
            return self._absent
        reason = cuda_lstm.refuse(self.native, request, self.device)
        return reason or self._unproven("lstm", request.device)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _unproven(self, family: str, device: torch.device) -> str | None:
        """Why a family's kernels are not to be used on a card; Dynamo does not look into it."""
        return self.missing or selfcheck.refusal(family, self, device)

    def lstm_forward(
        self, layer: LstmRequest, packed: Tensor | None, save: bool
    ) -> tuple[Tensor, ...]:
        """One layer; see ``cuda_lstm``. Nothing is ever packed for a card."""
        return cuda_lstm.forward(self._usable_native(), layer, save)

    def lstm_backward(
        self,
        layer: LstmRequest,
        gradients: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """Gradients of one layer."""
        return cuda_lstm.backward(self._usable_native(), layer, gradients, saved, wanted)

    def _usable_native(self) -> ModuleType:
        """For operators that are called without a request before: by exported code, say."""
        if self.native is None or self.missing:
            raise RuntimeError(f"backend 'cuda' cannot run: {self.missing}")
        return self.native

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> CardPlans:
        """Reads addresses and layouts once for many steps, card by card."""
        assert self.native is not None
        make = functools.partial(CudaPlan, self.native.OptimizerPlan)
        return CardPlans(make, optimizer, served, created)


def _native() -> ModuleType | str:
    try:
        from fastopt import _native_cuda
    except ImportError as error:
        return f"the CUDA module is not there: {error}"
    return _native_cuda


CUDA = CudaBackend(_native())


class CudaPlan(CardPlan):
    """Launches by the native module."""

    def _norm(self, grads: list[Tensor], order: float) -> Tensor:
        if order == 0 or (order != 2 and any(grad.is_complex() for grad in grads)):
            return torch.nn.utils.get_total_norm(grads, order).double()
        partials = torch.empty(
            max(self._native.chunk_count, 1), dtype=torch.float64, device=self._device
        )
        norm = torch.empty((), dtype=torch.float64, device=self._device)
        self._native.grad_norm(
            order, self._table.data_ptr(), partials.data_ptr(), norm.data_ptr(), self._stream()
        )
        return norm

    def _launch(self, rules: tuple[Any, ...], tail: tuple[Any, ...]) -> list[Tensor]:
        written: list[Tensor] = self._native.run(
            rules, tail, self._table.data_ptr(), self._functors.data_ptr(), self._stream()
        )
        return written

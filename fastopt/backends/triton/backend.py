"""The backend itself: what it takes, and who does it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.torch_version import TorchVersion as Version

from fastopt.backends import selfcheck
from fastopt.backends.contract import (
    AttentionRequest,
    Created,
    LinearCrossEntropyRequest,
    LstmRequest,
    OptimizerPlan,
    ParameterRequest,
    SteppedOptimizer,
)
from fastopt.backends.cuda_context import card_identity
from fastopt.backends.triton import (
    attention,
    launch,
    linear_cross_entropy,
    lstm,
    optimizer_step,
)

LEAST_CAPABILITY = 80
OLDEST = "3.6"


class TritonBackend:
    """Kernels for cards and toolchains where no nvcc was at hand.

    Args:
        device: The device type whose tensors it takes. The interpreter takes the CPU's.
    """

    name = "triton"

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    @functools.cached_property
    def missing(self) -> str:
        """Why Triton cannot be used, or ""; asked for at first use, as it initialises CUDA."""
        if find_spec("triton") is None:
            return "Triton is not installed"
        found = _triton_version()
        if found != "unknown" and Version(found) < Version(OLDEST):
            return f"Triton {found} is older than {OLDEST}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch finds no card"
        return ""

    def identity(self, device: torch.device) -> dict[str, str]:
        """The card, and what its kernels' results could hang on."""
        return {**card_identity(device), "triton": _triton_version(), "build": _sources()}

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _unusable(self, family: str, device: torch.device) -> str | None:
        """Why a family's kernels are not to be used on a card; Dynamo does not look into it."""
        if self.missing:
            return self.missing
        if launch.capability(device) < LEAST_CAPABILITY:
            return f"Triton kernels are for sm_{LEAST_CAPABILITY} and later"
        return selfcheck.refusal(family, self, device)

    def supports(self, request: ParameterRequest) -> str | None:
        """Plain tensors on a card; not what autograd has to record."""
        reason = optimizer_step.refuse(request, self.device)
        return reason or self._unusable("optimizer_step", request.device)

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> OptimizerPlan:
        """Reads addresses and layouts once for many steps, card by card."""
        return optimizer_step.plan(optimizer, served, created)

    def supports_lstm(self, request: LstmRequest) -> str | None:
        """Plain tensors on a card; inside a graph's capture no packed sequences."""
        return lstm.refuse(request, self.device) or self._unusable("lstm", request.device)

    def lstm_forward(
        self, layer: LstmRequest, packed: Tensor | None, save: bool
    ) -> tuple[Tensor, ...]:
        """One layer; nothing is ever packed for a card."""
        return lstm.forward(layer, save)

    def lstm_backward(
        self,
        layer: LstmRequest,
        gradients: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """Gradients of one layer."""
        return lstm.backward(layer, gradients, saved, wanted)

    def supports_linear_cross_entropy(self, request: LinearCrossEntropyRequest) -> str | None:
        """Plain tensors on a card, of two dimensions."""
        reason = linear_cross_entropy.refuse(request, self.device)
        return reason or self._unusable("linear_cross_entropy", request.device)

    def linear_cross_entropy_forward(
        self, request: LinearCrossEntropyRequest, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss and gradients; see ``linear_cross_entropy``."""
        return linear_cross_entropy.forward(request, wanted)

    def linear_cross_entropy_backward(
        self, request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input, weight and bias."""
        return linear_cross_entropy.backward(request, gradient, wanted)

    def supports_attention(self, request: AttentionRequest) -> str | None:
        """Plain tensors of fp32, bf16 or fp16 on a card, of up to 256 features."""
        reason = attention.refuse(request, self.device)
        return reason or self._unusable("attention", request.device)

    def attention_forward(
        self, request: AttentionRequest, inference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp."""
        return attention.forward(request, inference)

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
        return attention.backward(
            request, output_gradient, output, logsumexp, bias_wanted, sinks_wanted
        )


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:  # a build without metadata, of a distribution's own
        return "unknown"


@functools.cache
def _sources() -> str:
    """Of the kernels: another text is another build."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


TRITON = TritonBackend()

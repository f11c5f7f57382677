"""The attention of backend ``cuda``: what it takes, forward and backward."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import attention_requests
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.cuda_context import is_capturing, multiplies_in_tf32, stream_of
from fastopt.backends.plain_tensors import DLPACK_DEVICES, REAL_DTYPES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(native: ModuleType, request: AttentionRequest, device: str) -> str | None:
    """Why the kernels do not run this attention, or None."""
    if reason := attention_requests.refuse_attention(request, device, DTYPES):
        return reason
    most = native.most_attention_features
    for name, tensor in ("query", request.query), ("value", request.value):
        if tensor.size(-1) > most:
            return f"{name} has {tensor.size(-1)} features, of which the kernels take {most}"
    if is_capturing(request.device):
        if request.dropout > 0:
            return DROPS_THE_SAME
        if (native, *_arithmetic(request)) not in _loaded:
            return "a graph's capture needs a call before it, which loads the kernels"
    return None


DROPS_THE_SAME = "a graph would draw the same numbers for dropout at every replay"

# Modules, dtypes, whether in tf32, cards.
_loaded: set[tuple[ModuleType, torch.dtype, bool, int]] = set()


def _arithmetic(request: AttentionRequest) -> tuple[torch.dtype, bool, int]:
    dtype = request.query.dtype
    tf32 = dtype is torch.float32 and multiplies_in_tf32()
    return dtype, tf32, request.device.index or 0


def _call(native: ModuleType, request: AttentionRequest) -> tuple[bool, int, int, int]:
    """Arithmetic, card and stream; the kernels are there from now on."""
    dtype, tf32, index = _arithmetic(request)
    if request.dropout > 0 and is_capturing(request.device):  # of compiled code, say
        raise RuntimeError(DROPS_THE_SAME)
    if (native, dtype, tf32, index) not in _loaded:
        native.load_attention(REAL_DTYPES.index(dtype), tf32, index)
        _loaded.add((native, dtype, tf32, index))
    return tf32, DLPACK_DEVICES[request.device.type], index, stream_of(request.device)


def forward(native: Any, request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Output and logsumexp."""

    def run(output: Tensor, logsumexp: Tensor) -> None:
        tensors = attention_requests.native_tensors(native, request)
        native.attention_forward(tensors, output, logsumexp, *_call(native, request))

    return attention_requests.forward(request, run)


def backward(
    native: Any,
    request: AttentionRequest,
    output_gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    bias_wanted: bool,
    sinks_wanted: bool,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias and sinks; the latter are empty where not wanted.

    Blocks add to the gradients of queries in no fixed order, unless torch is to be deterministic.
    """

    def run(gradient: Tensor, gradients: list[Tensor | None]) -> None:
        tensors = attention_requests.native_tensors(native, request)
        deltas = torch.empty_like(logsumexp)
        sums = None
        if not torch.are_deterministic_algorithms_enabled():
            sums = torch.zeros(request.query.shape, dtype=torch.float32, device=request.device)
        native.attention_backward(
            tensors, output, logsumexp, gradient, gradients, deltas, sums, *_call(native, request)
        )
        if sums is not None and gradients[0] is not None:
            gradients[0].copy_(sums)

    bias_sums = attention_requests.full_bias_sums(request) if bias_wanted else None
    return attention_requests.backward(request, output_gradient, bias_sums, sinks_wanted, run)

"""The linear cross-entropy of backend ``triton``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import linear_cross_entropy
from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.cuda_context import is_capturing
from fastopt.backends.linear_cross_entropy import Chunks, Rows, chunks_on_card
from fastopt.backends.linear_cross_entropy_requests import (
    has_probabilities,
    refuse_linear_cross_entropy,
)
from fastopt.backends.plain_tensors import compute_dtype
from fastopt.backends.triton.launch import is_loaded, kernels, launch, mark_loaded

FAMILY = "linear_cross_entropy"

# Of a row at once: 16 elements for each thread of 8 warps, and of fp64, half as many.
BLOCK, NUM_WARPS = 4096, 8


def refuse(request: LinearCrossEntropyRequest, device: str) -> str | None:
    """Why the kernel does not run this layer, or None."""
    if reason := refuse_linear_cross_entropy(request, device):
        return reason
    if is_capturing(request.device):
        leaves = request.input, request.linear_weight, request.linear_bias
        is_trained = torch.is_grad_enabled() and any(
            leaf is not None and leaf.requires_grad for leaf in leaves
        )
        if not is_loaded(request.device, FAMILY, *_of(request, is_trained)):
            return "a graph's capture needs a call before it, which compiles the kernels"
    return None


def _of(request: LinearCrossEntropyRequest, with_gradients: bool) -> tuple[Any, ...]:
    """What is compiled apart, and whether gradients of losses by row are waited for."""
    options = request.label_smoothing, request.softcap, bool(request.z_loss)
    given = has_probabilities(request), request.weight is not None, request.reduction == "none"
    return request.input.dtype, request.linear_weight.size(0), *options, *given, with_gradients


def _chunks(request: LinearCrossEntropyRequest) -> Chunks:
    def kernel(rows: Rows) -> None:
        is_indexed = rows.targets.dtype is torch.int64
        size = rows.logits.element_size()
        launch(
            kernels("linear_cross_entropy")._cross_entropy_kernel,
            (rows.logits.size(0),),
            rows.logits.device,
            rows.logits,
            rows.targets if is_indexed else None,
            None if is_indexed else rows.targets,
            rows.class_weights,
            rows.loss_scale,
            rows.z_scale if request.z_loss else None,
            rows.losses,
            rows.logsumexps,
            rows.logits.stride(0),
            rows.logits.size(1),
            rows.ignore_index,
            num_warps=NUM_WARPS,
            SMOOTHING=rows.label_smoothing,
            CAP=rows.softcap if _can_be_divided_by(rows.softcap, rows.losses.dtype) else 0.0,
            BLOCK=BLOCK // 2 if size == 8 else BLOCK,
        )
        mark_loaded(rows.logits.device, FAMILY, *_of(request, rows.loss_scale is not None))

    return chunks_on_card(kernel)


def _can_be_divided_by(cap: float, dtype: torch.dtype) -> bool:
    """Whether a cap is one at all, and not so far away that it does not matter."""
    numbers = torch.finfo(compute_dtype(dtype))
    return cap != 0 and numbers.tiny <= abs(1 / cap) <= numbers.max


def forward(
    request: LinearCrossEntropyRequest, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients. A target that is no class makes NaN of its row."""
    return linear_cross_entropy.forward(request, wanted, _chunks(request))


def backward(
    request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients."""
    return linear_cross_entropy.backward(request, gradient, wanted, _chunks(request))

"""The linear cross-entropy of backend ``cuda``."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastopt.backends import linear_cross_entropy
from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.cuda_context import is_capturing, stream_of
from fastopt.backends.linear_cross_entropy import Chunks, Rows, chunks_on_card
from fastopt.backends.linear_cross_entropy_requests import refuse_linear_cross_entropy
from fastopt.backends.plain_tensors import DLPACK_DEVICES, REAL_DTYPES

# Modules, dtypes, cards.
_loaded: set[tuple[ModuleType, torch.dtype, int]] = set()


def refuse(native: ModuleType, request: LinearCrossEntropyRequest, device: str) -> str | None:
    """Why the kernels do not run this layer, or None."""
    if reason := refuse_linear_cross_entropy(request, device):
        return reason
    key = native, request.input.dtype, request.device.index or 0
    if is_capturing(request.device) and key not in _loaded:
        return "a graph's capture needs a call before it, which loads the kernels"
    return None


def _chunks(native: ModuleType) -> Chunks:
    def kernel(rows: Rows) -> None:
        device, dtype = rows.logits.device, rows.logits.dtype
        index = device.index or 0
        if (native, dtype, index) not in _loaded:
            native.load_cross_entropy(REAL_DTYPES.index(dtype), index)
            _loaded.add((native, dtype, index))
        given = native.CrossEntropyRows(*rows)
        native.cross_entropy(given, DLPACK_DEVICES[device.type], index, stream_of(device))

    return chunks_on_card(kernel)


def forward(
    native: ModuleType, request: LinearCrossEntropyRequest, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients. A target that is no class makes NaN of its row."""
    return linear_cross_entropy.forward(request, wanted, _chunks(native))


def backward(
    native: ModuleType, request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients."""
    return linear_cross_entropy.backward(request, gradient, wanted, _chunks(native))

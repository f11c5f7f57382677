"""The linear cross-entropy of backend ``cpu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends import linear_cross_entropy
from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.linear_cross_entropy import Chunks, Rows


def _kernel(rows: Rows) -> None:
    _native_cpu.cross_entropy(_native_cpu.CrossEntropyRows(*rows), torch.get_num_threads())


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision, and bf16 without instructions for it, are multiplied as fp32."""
    if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return torch.float64 if dtype is torch.float64 else torch.float32


# 342 rows of fp32, 66 MiB for 50,257 classes. Each chunk reads the weight twice, and its gradient
# once and writes it; 256 rows take 7% longer, more than 342 the same (2 cores of a Xeon with
# AVX-512, 768 features, row "linear cross-entropy 2048x768x50257, training").
CHUNKS = Chunks(_kernel, _product_dtype, bytes_per_class=1368, row_multiple=1, reads_targets=True)


def forward(
    request: LinearCrossEntropyRequest, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients."""
    return linear_cross_entropy.forward(request, wanted, CHUNKS)


def backward(
    request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients."""
    return linear_cross_entropy.backward(request, gradient, wanted, CHUNKS)

"""Calls of the linear cross-entropy that have every variant of its kernel compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.triton.backend import TritonBackend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROWS, FEATURES, CLASSES = 4, 16, 5008

Run = Callable[[TritonBackend], None]


def call(dtype: torch.dtype, *, given: bool = False, classes: int = CLASSES, **options: Any) -> Run:
    """Forward and backward; ``given``: probabilities and class weights."""
    target: torch.Tensor = torch.zeros(ROWS, dtype=torch.int64)
    weight = None
    if given:
        target, weight = torch.zeros(ROWS, classes, dtype=dtype), torch.ones(classes, dtype=dtype)
    request = LinearCrossEntropyRequest(
        torch.zeros(ROWS, FEATURES, dtype=dtype),
        torch.zeros(classes, FEATURES, dtype=dtype),
        target,
        weight=weight,
        **options,
    )

    def run(backend: TritonBackend) -> None:
        backend.linear_cross_entropy_forward(request, [False, False, False])
        backend.linear_cross_entropy_forward(request, [True, True, False])

    return run


RUNS: dict[str, Run] = {}
for _dtype in DTYPES:
    RUNS[f"{_dtype}"] = call(_dtype)
    RUNS[f"{_dtype}, everything"] = call(
        _dtype, given=True, label_smoothing=0.1, softcap=30.0, z_loss=1e-4
    )
    RUNS[f"{_dtype}, smoothed"] = call(_dtype, label_smoothing=0.1)
    RUNS[f"{_dtype}, softcap"] = call(_dtype, softcap=30.0)
RUNS["odd"] = call(torch.bfloat16, classes=5003)

"""Where another backend than the usual one is the fastest, as cards have shown."""

from __future__ import annotations

import torch

from fastopt.backends.contract import Request
from fastopt.backends.cuda_context import compute_capability
from fastopt.backends.measured_table import FASTEST
from fastopt.backends.plain_tensors import autocast_dtype


def fastest_measured(request: Request) -> str | None:
    """The backend that ``auto`` asks first, or None where nothing was measured."""
    if not FASTEST or request.device.type != "cuda":
        return None
    dtype = request.dtype
    if request.operator == "lstm":  # which is cast once its backend is chosen
        dtype = autocast_dtype(request.device) or dtype
    if dtype is torch.float16:  # takes as long as the half that is measured
        dtype = torch.bfloat16
    found = FASTEST.get((request.operator, str(dtype), _capability(request.device)))
    return None if found == "torch" and not request.may_be_stock else found


def _plain_capability(device: torch.device) -> int:
    """Dynamo would look through the decorator of a cache."""
    return compute_capability(device)


_capability = torch.compiler.assume_constant_result(_plain_capability)

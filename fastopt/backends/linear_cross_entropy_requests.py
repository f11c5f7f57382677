"""Which linear cross-entropies kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.plain_tensors import (
    REAL_DTYPES,
    autocast_dtype,
    compute_dtype,
    not_plain,
    on_several_cards,
    transformed,
)

REDUCTIONS = ("none", "mean", "sum")


def has_probabilities(request: LinearCrossEntropyRequest) -> bool:
    """Whether the target has a number for each class, as torch tells it: by its shape."""
    weight = request.linear_weight
    return request.target.shape == (request.input.size(0), *weight.shape[:-1])


def refuse_linear_cross_entropy(request: LinearCrossEntropyRequest, device: str) -> str | None:
    """Why kernels of a device type do not run this layer, or None."""
    if reason := transformed():
        return reason
    if request.device.type != device:
        return f"the input is on {request.device}"
    dtype = request.input.dtype
    if dtype not in REAL_DTYPES:
        return f"no kernel has the dtype {dtype}"
    if request.linear_weight.dim() != 2:
        return "a K-dimensional loss is torch's"
    # Autocast computes the loss in single precision.
    of_loss = dtype if autocast_dtype(request.device) is None else compute_dtype(dtype)
    target_dtype = of_loss if has_probabilities(request) else torch.int64
    named = (
        ("input", request.input, dtype),
        ("linear_weight", request.linear_weight, dtype),
        ("linear_bias", request.linear_bias, dtype),
        ("target", request.target, target_dtype),
        ("weight", request.weight, of_loss),
    )
    if reason := on_several_cards([tensor for _, tensor, _ in named], request.device):
        return reason
    for name, tensor, wanted in named:
        if tensor is None:
            continue
        if tensor.dtype is not wanted:
            return f"{name} has dtype {tensor.dtype} beside an input of {dtype}"
        if torch.compiler.is_compiling():
            continue
        if reason := not_plain(name, tensor, device, (wanted,)):
            return reason
    for name, given in ("target", request.target), ("weight", request.weight):
        if given is not None and given.requires_grad and torch.is_grad_enabled():
            return f"the gradient of {name} is torch's"
    return _refuse_sizes(request)


def _refuse_sizes(request: LinearCrossEntropyRequest) -> str | None:
    """What does not fit is for torch to refuse, in its own words."""
    classes, features = request.linear_weight.shape
    rows = request.input.size(0)
    if 0 in (classes, features):
        return "there are no classes or no features"
    if not has_probabilities(request) and request.target.shape != (rows,):
        return f"target has shape {tuple(request.target.shape)} beside {rows} rows of input"
    if request.weight is not None and request.weight.shape != (classes,):
        return f"weight has shape {tuple(request.weight.shape)} beside {classes} classes"
    if request.reduction not in REDUCTIONS:
        return f"reduction is {request.reduction!r}"
    if not 0 <= request.label_smoothing <= 1:
        return f"label_smoothing is {request.label_smoothing}"
    return None


def empty_gradient(tensor: Tensor | None, like: Tensor, wanted: bool) -> Tensor:
    """Laid out as the tensor; of no elements where nobody wants it."""
    return torch.empty_like(tensor) if wanted and tensor is not None else like.new_empty(0)

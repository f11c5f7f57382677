"""What backends share of the LSTM: which requests fit, and what results look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda_context import is_capturing
from fastopt.backends.plain_tensors import (
    REAL_DTYPES,
    autocast_dtype,
    compute_dtype,
    not_plain,
    on_several_cards,
    transformed,
)


def refuse_lstm(request: LstmRequest, device: str) -> str | None:
    """Why kernels of a device type do not run these layers, or None."""
    if reason := transformed():
        return reason
    if request.device.type != device:
        return f"the input is on {request.device}"
    tensors = [request.input, request.initial_hidden, request.initial_cell, *request.weights]
    if reason := on_several_cards(tensors, request.device):
        return reason
    casts = autocast_dtype(request.device) is not None
    # Of these, stock casts some results and not others: that is left to it.
    if casts and (request.batch_sizes is not None or _is_projected(request)):
        return "autocast of packed sequences and of projections is torch's"
    if request.input.dtype not in REAL_DTYPES:
        return f"no kernel has the dtype {request.input.dtype}"
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if reason := not_plain("a tensor", tensor, device):
                return reason
            if tensor.dtype is not request.input.dtype and not casts:
                return f"tensors are {request.input.dtype} and {tensor.dtype}"
    return _refuse_sizes(request)


CAPTURE_NEEDS_A_CALL = "a graph's capture needs a call before it, which loads the kernels"


def refuse_capture(request: LstmRequest, is_loaded: Callable[[], bool]) -> str | None:
    """Why a graph that is being captured cannot take these layers, or None."""
    if not is_capturing(request.device):
        return None
    if request.batch_sizes is not None:
        return "the steps of packed sequences cannot be copied inside a graph's capture"
    return None if is_loaded() else CAPTURE_NEEDS_A_CALL


def _is_projected(request: LstmRequest) -> bool:
    return request.initial_hidden.size(-1) != request.initial_cell.size(-1)


def _refuse_sizes(request: LstmRequest) -> str | None:
    """Sizes that do not fit are for torch to refuse, in its own words."""
    unfit = "the sizes of input, states and weights do not fit each other"
    count = 2 + 2 * request.has_biases
    blocks = request.num_layers * (2 if request.bidirectional else 1)
    projected = len(request.weights) == (count + 1) * blocks
    if len(request.weights) != (count + projected) * blocks:
        return unfit
    dims, states = 3 if request.batch_sizes is None else 2, request.initial_hidden
    if request.input.dim() != dims or states.dim() != 3 or request.initial_cell.dim() != 3:
        return unfit
    if request.input.numel() == 0 or request.initial_cell.numel() == 0:
        return "there is nothing to compute"
    batch, outputs, hidden = states.size(1), states.size(2), request.initial_cell.size(2)
    if request.batch_sizes is None:
        if request.input.size(1) != batch:
            return unfit
    elif not torch.compiler.is_compiling() and int(request.batch_sizes[0]) != batch:
        return unfit
    if request.initial_cell.shape[:2] != states.shape[:2] or states.size(0) != blocks:
        return unfit
    if not projected and outputs != hidden:
        return unfit
    inputs = request.input.size(-1)
    directions = 2 if request.bidirectional else 1
    for block in range(blocks):
        own = request.weights[block * (count + projected) :][: count + projected]
        wide = inputs if block < directions else directions * outputs
        shapes: list[tuple[int, ...]] = [(4 * hidden, wide), (4 * hidden, outputs)]
        shapes += [(4 * hidden,)] * 2 if request.has_biases else []
        shapes += [(outputs, hidden)] if projected else []
        if any(tuple(w.shape) != shape for w, shape in zip(own, shapes, strict=True)):
            return unfit
    return None


def with_gaps(tensors: Sequence[Any], directions: int, has_biases: bool) -> list[Any]:
    """Weights, or what belongs to them, with None for biases and projections that are not there."""
    count = max(1, len(tensors) // directions)
    filled: list[Any] = []
    for first in range(0, len(tensors), count):
        own = list(tensors[first : first + count])
        if not has_biases:
            own[2:2] = [None, None]
        filled += own if len(own) == 5 else [*own, None]
    return filled


def result_shapes(
    input: Tensor, initial_hidden: Tensor, initial_cell: Tensor, save: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of output, final states, saved gates and saved cells."""
    directions, _, outputs = initial_hidden.shape
    hidden = initial_cell.size(2)
    tokens = input.size(0) if input.dim() == 2 else input.size(0) * input.size(1)
    saved = tokens if save else 0
    return [
        ((*input.shape[:-1], directions * outputs), input.dtype),
        (tuple(initial_hidden.shape), input.dtype),
        (tuple(initial_cell.shape), input.dtype),
        ((directions, saved, 4 * hidden), input.dtype),
        ((directions, saved, hidden), compute_dtype(input.dtype)),
    ]

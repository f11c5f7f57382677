"""The LSTM of backend ``cpu``: what it takes, and one layer forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.contract import LstmRequest
from fastopt.backends.plain_tensors import (
    REAL_DTYPES,
    autocast_dtype,
    compute_dtype,
    not_plain,
    transformed,
)


def refuse_lstm(request: LstmRequest) -> str | None:
    """Why the kernels do not run these layers, or None."""
    if reason := transformed():
        return reason
    if request.device.type != "cpu":
        return f"the input is on {request.device}"
    casts = autocast_dtype(request.device) is not None
    # Of these, stock casts some results and not others: that is left to it.
    if casts and (request.batch_sizes is not None or _is_projected(request)):
        return "autocast of packed sequences and of projections is torch's"
    if request.input.dtype not in REAL_DTYPES:
        return f"no kernel has the dtype {request.input.dtype}"
    if not torch.compiler.is_compiling():
        tensors = [request.input, request.initial_hidden, request.initial_cell, *request.weights]
        for tensor in tensors:
            if reason := not_plain("a tensor", tensor, "cpu"):
                return reason
            if tensor.dtype is not request.input.dtype and not casts:
                return f"tensors are {request.input.dtype} and {tensor.dtype}"
    return _refuse_sizes(request)


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


def _with_gaps(tensors: Sequence[Any], directions: int, has_biases: bool) -> list[Any]:
    """Weights, or what belongs to them, with None for biases and projections that are not there."""
    count = max(1, len(tensors) // directions)
    filled: list[Any] = []
    for first in range(0, len(tensors), count):
        own = list(tensors[first : first + count])
        if not has_biases:
            own[2:2] = [None, None]
        filled += own if len(own) == 5 else [*own, None]
    return filled


def _layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
) -> _native_cpu.LstmTensors:
    if input.size(-1) > 1 and input.stride(-1) != 1:
        input = input.contiguous()
    dense = [weight.contiguous() for weight in weights]
    return _native_cpu.LstmTensors(
        input,
        None if batch_sizes is None else batch_sizes.tolist(),
        initial_hidden.contiguous(),
        initial_cell.contiguous(),
        _with_gaps(dense, initial_hidden.size(0), has_biases),
    )


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


def forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    packed: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    """Runs one layer; see ``fastopt/ops/lstm.py``."""
    layer = _layer(input, batch_sizes, initial_hidden, initial_cell, weights, has_biases)
    shapes = result_shapes(input, initial_hidden, initial_cell, save)
    results = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    passed = results if save else [*results[:3], None, None]
    _native_cpu.lstm_forward(layer, packed, passed, torch.get_num_threads())
    return tuple(results)


def pack(weights: Sequence[Tensor], has_biases: bool, directions: int) -> Tensor:
    """The weights of one layer as the kernels read them, ``[directions, bytes]``.

    Raises:
        RuntimeError: The kernels do not take a weight.
    """
    for weight in weights:
        reason = not_plain("a weight", weight, "cpu")
        if reason is None and weight.dtype not in REAL_DTYPES:
            reason = f"no kernel has the dtype {weight.dtype}"
        if reason is not None:
            raise RuntimeError(f"cannot pack the weights: {reason}")
    weight_ih, weight_hh = weights[0], weights[1]
    hidden, outputs = weight_ih.size(0) // 4, weight_hh.size(1)
    input, h, c = (
        weight_ih.new_empty(shape)
        for shape in ((1, 1, weight_ih.size(1)), (directions, 1, outputs), (directions, 1, hidden))
    )
    layer = _layer(input, None, h, c, weights, has_biases)
    size = _native_cpu.lstm_packed_bytes(layer)
    packed = torch.empty((directions, size), dtype=torch.uint8)
    _native_cpu.lstm_pack(layer, packed, torch.get_num_threads())
    return packed


def backward(
    output_gradient: Tensor | None,
    final_hidden_gradient: Tensor | None,
    final_cell_gradient: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    output: Tensor,
    saved_gates: Tensor,
    saved_cells: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of input, initial states and weights that are wanted, in this order."""
    layer = _layer(input, batch_sizes, initial_hidden, initial_cell, weights, has_biases)
    gradients = output_gradient, final_hidden_gradient, final_cell_gradient
    given = [None if gradient is None else gradient.contiguous() for gradient in gradients]
    everything = [input, initial_hidden, initial_cell, *weights]
    made = [
        torch.empty(tensor.shape, dtype=tensor.dtype) if want else None
        for tensor, want in zip(everything[1:], wanted[1:], strict=True)
    ]
    # Each direction has an input gradient of its own.
    directions, tokens = saved_gates.shape[:2]
    parts = None
    if wanted[0]:
        parts = torch.empty((directions, tokens, input.size(-1)), dtype=input.dtype)
    results = [parts, *made[:2], *_with_gaps(made[2:], directions, has_biases)]
    saved = [output, saved_gates, saved_cells]
    _native_cpu.lstm_backward(layer, saved, given, results, torch.get_num_threads())
    if parts is not None:
        made.insert(0, (parts[0] if directions == 1 else parts.sum(0)).view(input.shape))
    return [tensor for tensor in made if tensor is not None]

"""The LSTM of backend ``cpu``: what it takes, and one layer forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.contract import LstmRequest
from fastopt.backends.plain_tensors import not_plain

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refuse_lstm(request: LstmRequest) -> str | None:
    """Why the kernels do not run these layers, or None."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation has no tangents of the kernels"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if request.device.type != "cpu":
        return f"the input is on {request.device}"
    casts = torch.is_autocast_enabled(request.device.type)
    if casts and (request.batch_sizes is not None or _is_projected(request)):
        return "autocast of packed sequences and of projections is torch's"
    if request.input.dtype not in DTYPES:
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


def autocast_dtype(request: LstmRequest) -> torch.dtype | None:
    """What everything is cast to before the kernels run, where autocast is on.

    With a projection or packed input stock casts some results and not others: that is left to it.
    """
    kind = request.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


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


class Layer(NamedTuple):
    """The tensors of a layer as the kernels want them."""

    sizes: tuple[int, ...]
    batch_sizes: list[int]
    tensors: tuple[Tensor | None, ...]
    directions: int
    per_direction: int


def _layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
) -> Layer:
    directions, batch, outputs = initial_hidden.shape
    per_direction = len(weights) // directions
    if input.stride(-1) != 1 and input.size(-1) > 1:
        input = input.contiguous()
    if batch_sizes is None:
        rows, strides = [batch] * input.size(0), (input.stride(0), input.stride(1))
        tokens = input.size(0) * batch
        if strides[0] == 0:  # means "packed" to the kernels
            input = input.contiguous()
            strides = (input.stride(0), input.stride(1))
    else:
        rows, strides, tokens = batch_sizes.tolist(), (0, input.stride(0)), input.size(0)
    tensors: list[Tensor | None] = [input, initial_hidden.contiguous(), initial_cell.contiguous()]
    for first in range(0, len(weights), per_direction):
        own: list[Tensor | None] = [w.contiguous() for w in weights[first : first + per_direction]]
        if not has_biases:
            own[2:2] = [None, None]
        tensors += own if len(own) == 5 else [*own, None]
    widths = input.size(-1), initial_cell.size(2), outputs
    sizes = (directions, len(rows), batch, tokens, *widths, *strides)
    return Layer(sizes, rows, tuple(tensors), directions, per_direction)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic."""
    return torch.float64 if dtype is torch.float64 else torch.float32


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
    results = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in shapes)
    passed = results if save else (*results[:3], None, None)
    _native_cpu.lstm_forward(
        layer.sizes, layer.batch_sizes, layer.tensors, packed, passed, torch.get_num_threads()
    )
    return results


def pack(weights: Sequence[Tensor], has_biases: bool, directions: int) -> Tensor:
    """The weights of one layer as the kernels read them, ``[directions, bytes]``."""
    weight_ih, weight_hh = weights[0], weights[1]
    hidden, outputs = weight_ih.size(0) // 4, weight_hh.size(1)
    input, h, c = (
        weight_ih.new_empty(shape)
        for shape in ((1, 1, weight_ih.size(1)), (directions, 1, outputs), (directions, 1, hidden))
    )
    layer = _layer(input, None, h, c, weights, has_biases)
    size = _native_cpu.lstm_packed_bytes(layer.sizes, layer.tensors)
    packed = torch.empty((directions, size), dtype=torch.uint8)
    _native_cpu.lstm_pack(layer.sizes, layer.tensors, packed, torch.get_num_threads())
    return packed


def backward(
    gradients: Sequence[Tensor | None],
    input: Tensor,
    batch_sizes: Tensor | None,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    saved: tuple[Tensor, Tensor, Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of input, initial states and weights that are wanted, in this order."""
    layer = _layer(input, batch_sizes, initial_hidden, initial_cell, weights, has_biases)
    given = tuple(None if g is None else g.contiguous() for g in gradients)
    everything = [input, initial_hidden, initial_cell, *weights]
    made: list[Tensor | None] = [
        torch.empty(tensor.shape, dtype=tensor.dtype) if want else None
        for tensor, want in zip(everything, wanted, strict=True)
    ]
    # Each direction has an input gradient of its own.
    per_direction = made[0]
    if per_direction is not None and layer.directions == 2:
        per_direction = torch.empty((2, *input.shape), dtype=input.dtype)
    results: list[Tensor | None] = [per_direction, *made[1:3]]
    for direction in range(layer.directions):
        first = 3 + direction * layer.per_direction
        own = made[first : first + layer.per_direction]
        if has_biases:  # both biases have the same gradient
            biases = [bias for bias in own[2:4] if bias is not None]
            own[2:4] = [biases[0] if biases else None]
        else:
            own[2:2] = [None]
        results += own if len(own) == 4 else [*own, None]
    _native_cpu.lstm_backward(
        layer.sizes,
        layer.batch_sizes,
        layer.tensors,
        saved,
        given,
        tuple(results),
        torch.get_num_threads(),
    )
    if per_direction is not made[0] and per_direction is not None:
        torch.sum(per_direction, 0, out=made[0])
    if has_biases:
        for direction in range(layer.directions):
            first = 3 + direction * layer.per_direction + 2
            pair = made[first], made[first + 1]
            if pair[0] is not None and pair[1] is not None:
                pair[1].copy_(pair[0])
    return [tensor for tensor in made if tensor is not None]

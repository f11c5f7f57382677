"""The LSTM of backend ``cpu``: one layer forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.contract import LstmRequest
from fastopt.backends.lstm_requests import result_shapes, with_gaps
from fastopt.backends.plain_tensors import REAL_DTYPES, not_plain


def _native_layer(layer: LstmRequest) -> _native_cpu.LstmTensors:
    input, sizes = layer.input, layer.batch_sizes
    if input.size(-1) > 1 and input.stride(-1) != 1:
        input = input.contiguous()
    dense = [weight.contiguous() for weight in layer.weights]
    return _native_cpu.LstmTensors(
        input,
        None if sizes is None else sizes.tolist(),
        layer.initial_hidden.contiguous(),
        layer.initial_cell.contiguous(),
        with_gaps(dense, layer.initial_hidden.size(0), layer.has_biases),
    )


def forward(layer: LstmRequest, packed: Tensor | None, save: bool) -> tuple[Tensor, ...]:
    """Runs one layer; see ``Kernels``."""
    native = _native_layer(layer)
    shapes = result_shapes(layer.input, layer.initial_hidden, layer.initial_cell, save)
    results = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    passed = results if save else [*results[:3], None, None]
    _native_cpu.lstm_forward(native, packed, passed, torch.get_num_threads())
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
    layer = _native_layer(LstmRequest(input, None, h, c, weights, has_biases, 1, directions == 2))
    size = _native_cpu.lstm_packed_bytes(layer)
    packed = torch.empty((directions, size), dtype=torch.uint8)
    _native_cpu.lstm_pack(layer, packed, torch.get_num_threads())
    return packed


def backward(
    layer: LstmRequest,
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of input, initial states and weights that are wanted, in this order."""
    native, input = _native_layer(layer), layer.input
    given = [None if gradient is None else gradient.contiguous() for gradient in gradients]
    made = [
        torch.empty(tensor.shape, dtype=tensor.dtype) if want else None
        for tensor, want in zip(
            [layer.initial_hidden, layer.initial_cell, *layer.weights], wanted[1:], strict=True
        )
    ]
    # Each direction has an input gradient of its own.
    directions, tokens = saved[1].shape[:2]
    parts = None
    if wanted[0]:
        parts = torch.empty((directions, tokens, input.size(-1)), dtype=input.dtype)
    results = [parts, *made[:2], *with_gaps(made[2:], directions, layer.has_biases)]
    _native_cpu.lstm_backward(native, saved, given, results, torch.get_num_threads())
    if parts is not None:
        made.insert(0, (parts[0] if directions == 1 else parts.sum(0)).view(input.shape))
    return [tensor for tensor in made if tensor is not None]

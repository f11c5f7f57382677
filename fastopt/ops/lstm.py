"""The operator ``lstm``: layers, directions and dropout around the registered ``lstm_layer``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from fastopt.backends import cpu_lstm, registry
from fastopt.backends.contract import LstmRequest
from fastopt.backends.lstm_requests import result_shapes
from fastopt.backends.plain_tensors import autocast_dtype
from fastopt.backends.reference import reference_lstm

LIBRARY = torch.library.Library("fastopt", "FRAGMENT")

# Input [steps, batch, input_size], or with batch_sizes [tokens, input_size]; initial states
# [directions, batch, ...]; weights as in LstmRequest, of one layer, and the same packed, or None.
# With `save`, the last two results are what the backward needs, otherwise they are empty.
LIBRARY.define(
    "lstm_layer(Tensor input, Tensor? batch_sizes, Tensor initial_hidden, Tensor initial_cell, "
    "Tensor[] weights, bool has_biases, Tensor? packed, bool save, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Gradients with respect to those of input, initial states and weights that are wanted.
LIBRARY.define(
    "lstm_layer_backward(Tensor? output_gradient, Tensor? final_hidden_gradient, "
    "Tensor? final_cell_gradient, Tensor input, Tensor? batch_sizes, Tensor initial_hidden, "
    "Tensor initial_cell, Tensor[] weights, bool has_biases, Tensor output, Tensor saved_gates, "
    "Tensor saved_cells, bool[] wanted, str backend) -> Tensor[]"
)


# How many arguments of the operators are the layer itself, in the order of an LstmRequest.
_OF_LAYER = 6


def _layer(arguments: Sequence[Any]) -> LstmRequest:
    input, batch_sizes, hidden, cell, weights, has_biases = arguments
    directions = hidden.size(0)
    return LstmRequest(input, batch_sizes, hidden, cell, weights, has_biases, 1, directions == 2)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    packed, save, backend = arguments[_OF_LAYER:]
    layer = _layer(arguments[:_OF_LAYER])
    return registry.kernels(backend).lstm_forward(layer, packed, save)


def _backward(*arguments: Any) -> list[Tensor]:
    gradients, rest = arguments[:3], arguments[3:]
    *saved, wanted, backend = rest[_OF_LAYER:]
    layer = _layer(rest[:_OF_LAYER])
    return registry.kernels(backend).lstm_backward(layer, gradients, saved, wanted)


for _device in registry.DISPATCH_KEYS:
    torch.library.impl(LIBRARY, "lstm_layer", _device)(_forward)
    torch.library.impl(LIBRARY, "lstm_layer_backward", _device)(_backward)


@torch.library.register_fake("fastopt::lstm_layer", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_layer(input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, initial_hidden, initial_cell, *_, save, _ = arguments
    shapes = result_shapes(input, initial_hidden, initial_cell, save)
    return tuple([input.new_empty(shape, dtype=dtype) for shape, dtype in shapes])


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "fastopt::lstm_layer_backward", lib=LIBRARY
)
def _fake_layer_backward(*arguments: Any) -> list[Tensor]:
    _, _, _, input, _, initial_hidden, initial_cell, weights, *_, wanted, _ = arguments
    everything = [input, initial_hidden, initial_cell, *weights]
    return [
        tensor.new_empty(tensor.shape)
        for tensor, want in zip(everything, wanted, strict=True)
        if want
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, initial_hidden, initial_cell, weights, has_biases, *_, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.has_biases, ctx.backend = has_biases, backend
    ctx.save_for_backward(
        input, batch_sizes, initial_hidden, initial_cell, output[0], *output[3:], *weights
    )


def _layer_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    input, batch_sizes, h0, c0, output, saved_gates, saved_cells, *weights = ctx.saved_tensors
    from_outside = gradients[:3]
    wanted_weights = list(ctx.needs_input_grad[4]) if weights else []
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4], *wanted_weights]
    if all(gradient is None for gradient in from_outside) or not any(wanted):
        return None, None, None, None, [None] * len(weights), *[None] * 4
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        layer = _layer((input, batch_sizes, h0, c0, weights, ctx.has_biases))
        grads = _differentiable_gradients(from_outside, layer, wanted)
    else:
        grads = torch.ops.fastopt.lstm_layer_backward(
            *from_outside, input, batch_sizes, h0, c0, weights, ctx.has_biases, output,
            saved_gates, saved_cells, wanted, ctx.backend,
        )  # fmt: skip
    found = iter(grads)
    placed = [next(found) if want else None for want in wanted]
    return placed[0], None, placed[1], placed[2], placed[3:], *[None] * 4


torch.library.register_autograd(
    "fastopt::lstm_layer", _layer_gradients, setup_context=_setup_context, lib=LIBRARY
)


def _differentiable_gradients(
    gradients: Sequence[Tensor | None], layer: LstmRequest, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by torch's operations step by step, for derivatives of higher order."""
    with torch.enable_grad(), torch.backends.mkldnn.flags(enabled=False):
        # Aliases: one tensor may have been made from another, which is not this call's to follow.
        given = [layer.input, layer.initial_hidden, layer.initial_cell, *layer.weights]
        everything = [tensor.view_as(tensor) for tensor in given]
        layer = dataclasses.replace(
            layer, input=everything[0], initial_hidden=everything[1], initial_cell=everything[2],
            weights=everything[3:],
        )  # fmt: skip
        outputs = stock_lstm(layer, dropout=0.0, training=False)
        used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        return list(
            torch.autograd.grad(
                [output for output, _ in used],
                [t for t, want in zip(everything, wanted, strict=True) if want],
                [gradient for _, gradient in used],
                create_graph=True,
                allow_unused=True,
            )
        )


def stock_lstm(
    request: LstmRequest, *, dropout: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own operator."""
    states, weights = [request.initial_hidden, request.initial_cell], list(request.weights)
    rest = request.has_biases, request.num_layers, dropout, training, request.bidirectional
    if request.batch_sizes is None:
        result = _VF.lstm(request.input, states, weights, *rest, False)
    else:
        result = _VF.lstm(request.input, request.batch_sizes, states, weights, *rest)
    return tuple(result)  # type: ignore[return-value]


def lstm(
    request: LstmRequest,
    *,
    dropout: float,
    training: bool,
    packed: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs all layers.

    Args:
        request: The layers and what they run over.
        dropout: Probability of dropping an output of any layer but the last.
        training: Whether to drop.
        packed: For each layer, what ``cpu_lstm.pack`` has made of these very weights.
        backend: The backend that the module names.

    Returns:
        Output, final hidden and final cell states.

    Raises:
        RuntimeError: The backend that the user named does not take the tensors; besides, whatever
            torch raises.
    """
    if torch.compiler.is_compiling():  # Dynamo reads neither context variables nor loggers
        chosen = registry.choose_silently(request, backend or "auto")
    else:
        chosen = registry.choose(request, registry.requested(backend)).name
    if chosen == "torch":
        return stock_lstm(request, dropout=dropout, training=training)
    if (cast := autocast_dtype(request.device)) is not None:
        request = request.cast(cast)
        packed = None
    input, final_hidden, final_cell = request.input, [], []
    for number in range(request.num_layers):
        if number > 0 and dropout > 0 and training:
            input = torch.dropout(input, dropout, True)
        layer = request.layer(number, input)
        if chosen == "reference":
            input, hidden, cell = reference_lstm(layer)
        else:
            input, hidden, cell = _registered_layer(
                layer, packed[number] if packed else None, chosen
            )
        final_hidden.append(hidden)
        final_cell.append(cell)
    if request.num_layers == 1:
        return input, final_hidden[0], final_cell[0]
    return input, torch.cat(final_hidden), torch.cat(final_cell)


def _registered_layer(
    layer: LstmRequest, packed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    everything = [layer.input, layer.initial_hidden, layer.initial_cell, *layer.weights]
    save = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in everything])
    output, hidden, cell, _, _ = torch.ops.fastopt.lstm_layer(
        layer.input, layer.batch_sizes, layer.initial_hidden, layer.initial_cell, layer.weights,
        layer.has_biases, packed, save, backend,
    )  # fmt: skip
    return output, hidden, cell


class FrozenWeights:
    """Weights packed once for many calls, and how to tell that they have changed since."""

    def __init__(
        self, names: Sequence[str], weights: Sequence[Tensor], has_biases: bool, num_layers: int,
        directions: int,
    ) -> None:  # fmt: skip
        per_layer = len(weights) // num_layers
        layers = [weights[first : first + per_layer] for first in range(0, len(weights), per_layer)]
        self._names = list(names)
        self._marks = [self._mark(weight) for weight in weights]
        self._packed = [cpu_lstm.pack(layer, has_biases, directions) for layer in layers]

    @staticmethod
    def _mark(weight: Tensor) -> tuple[int, int, int]:
        return id(weight), weight.data_ptr(), weight._version

    def packed(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What was packed.

        Raises:
            RuntimeError: A weight is another tensor, lies elsewhere or has been written.
        """
        for name, weight, mark in zip(self._names, weights, self._marks, strict=True):
            if self._mark(weight) != mark:
                raise RuntimeError(
                    f"{name} has changed since freeze(): call freeze() again, or unfreeze()"
                )
        return self._packed

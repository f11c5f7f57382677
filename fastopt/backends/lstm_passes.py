"""Both passes of one layer of an LSTM on a card, around the kernels of a backend.

Torch multiplies over all tokens at once, before and after the recurrence. A backend runs the
recurrence in a way of its own, or leaves the products of each step to torch as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastopt.backends.contract import LstmRequest
from fastopt.backends.lstm_layer import Layer, Weights
from fastopt.backends.lstm_requests import result_shapes, with_gaps
from fastopt.backends.plain_tensors import autocast_dtype, compute_dtype


class ForwardRun(NamedTuple):
    """What the forward recurrence reads and writes; cells are in the type of the arithmetic."""

    # [directions, tokens, 4 * hidden], products of the inputs, with the biases. Where cells are
    # saved, they become the gates after their activations.
    gates: Tensor
    cells: Tensor  # [directions, batch, hidden]: the initial ones become the final ones
    saved_cells: Tensor | None  # [directions, tokens, hidden]
    output: Tensor  # [tokens, directions * outputs]


class BackwardRun(NamedTuple):
    """What the backward recurrence reads; None for gradients that are zeros."""

    output_gradient: Tensor | None  # [tokens, directions * outputs]
    final_hidden_gradient: Tensor | None  # [directions, batch, outputs]
    # [directions, batch, hidden]: that of the final cells becomes that of the initial ones
    cell_gradient: Tensor
    gates: Tensor  # as the forward pass has left them
    cells: Tensor


class Gradients(NamedTuple):
    """What the backward recurrence leaves; products over all tokens follow."""

    gates: Tensor  # [directions, tokens, 4 * hidden], of the pre-activations
    initial_hidden: Tensor
    # Of the projection, [directions, tokens, outputs] and what it was given, [..., hidden].
    projected: Tensor | None
    unprojected: Tensor | None


class CellForward(NamedTuple):
    """One step of one direction; tensors are ``[rows, ...]``, and all but the output are dense."""

    rows: int
    gates: Tensor  # as in ForwardRun
    product: Tensor  # of the hidden state before the step, added to the gates
    save_gates: bool
    cells: Tensor  # before the step, and after it
    saved_cells: Tensor | None
    hidden_out: Tensor
    output: Tensor | None  # the same once more


class CellBackward(NamedTuple):
    """The same backward; all but the output's gradient are dense."""

    rows: int
    gates: Tensor
    cells: Tensor
    cells_before: Tensor
    hidden_gradient: Tensor
    output_gradient: Tensor | None  # added to it
    cell_gradient: Tensor  # of the cells after the step, and then of those before it
    gate_gradient: Tensor
    hidden_out: Tensor | None  # the hidden state before its projection


class Recurrence(Protocol):
    """The kernels of a backend, for one layer."""

    def forward(self, run: ForwardRun) -> Tensor | None:
        """All steps of all directions; the final hidden state, or None where that cannot be."""

    def backward(self, run: BackwardRun) -> Gradients | None:
        """The same backward."""

    def cell_forward(self, step: CellForward) -> None:
        """The cells of one step."""

    def cell_backward(self, step: CellBackward) -> None:
        """The same backward."""


def forward(
    request: LstmRequest, save: bool, recurrence_of: Callable[[Layer], Recurrence]
) -> tuple[Tensor, ...]:
    """Output, final states and, with ``save``, what the backward pass needs of one layer."""
    with _without_autocast(request.device):
        layer = Layer(request)
        recurrence = recurrence_of(layer)
        (output_shape, _), *_, (saved_shape, compute) = result_shapes(
            request.input, request.initial_hidden, request.initial_cell, save
        )
        gates = layer.empty(layer.directions, layer.tokens, 4 * layer.hidden)
        for own, target in zip(layer.weights, gates, strict=True):
            if own.input_bias is None or own.hidden_bias is None:
                torch.mm(layer.input, own.input.t(), out=target)
            else:
                bias = own.input_bias + own.hidden_bias
                torch.addmm(bias, layer.input, own.input.t(), out=target)
        cells = layer.initial_cell.to(compute, copy=True)
        saved_cells = torch.empty(saved_shape, dtype=compute, device=layer.device)
        output = layer.empty(layer.tokens, layer.directions * layer.outputs)
        run = ForwardRun(gates, cells, saved_cells if save else None, output)
        final_hidden = recurrence.forward(run)
        if final_hidden is None:
            final_hidden = _stepwise_forward(layer, recurrence, run)
        saved_gates = gates if save else layer.empty(layer.directions, 0, 4 * layer.hidden)
        final_cell = cells.to(layer.dtype)
        return output.view(output_shape), final_hidden, final_cell, saved_gates, saved_cells


def backward(
    request: LstmRequest,
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
    recurrence_of: Callable[[Layer], Recurrence],
) -> list[Tensor]:
    """Gradients of those of input, initial states and weights that are wanted, in this order."""
    output_gradient, final_hidden_gradient, final_cell_gradient = gradients
    output, saved_gates, saved_cells = saved
    input, initial_cell = request.input, request.initial_cell
    with _without_autocast(input.device):
        layer = Layer(request)
        recurrence = recurrence_of(layer)
        width = layer.directions * layer.outputs
        _check("gradient of output", output_gradient, (*input.shape[:-1], width))
        _check("output", output, (*input.shape[:-1], width))
        if output_gradient is not None:
            output_gradient = output_gradient.reshape(layer.tokens, width).contiguous()
        compute = compute_dtype(layer.dtype)
        if final_cell_gradient is None:
            cells = torch.zeros(initial_cell.shape, dtype=compute, device=layer.device)
        else:
            _check("gradient of final_cell", final_cell_gradient, tuple(initial_cell.shape))
            cells = torch.empty(initial_cell.shape, dtype=compute, device=layer.device)
            cells.copy_(final_cell_gradient)
        if final_hidden_gradient is not None:
            final_hidden_gradient = final_hidden_gradient.contiguous()
        run = BackwardRun(output_gradient, final_hidden_gradient, cells, saved_gates, saved_cells)
        found = recurrence.backward(run)
        if found is None:
            found = _stepwise_backward(layer, recurrence, run)
        output = output.reshape(layer.tokens, width)
        return _products(layer, found, cells, output, input, wanted)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What arrives has been cast already."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be contiguous, of shape {list(shape)}")


def _stepwise_forward(layer: Layer, recurrence: Recurrence, run: ForwardRun) -> Tensor:
    gates, cells, saved_cells, output = run
    state = layer.initial_hidden.clone()
    product = layer.empty(layer.batch, 4 * layer.hidden)
    unprojected = layer.empty(layer.batch, layer.hidden)
    for direction, weights in enumerate(layer.weights):
        outputs = layer.of_direction(output, direction)
        for begin, end in layer.order(direction):
            rows = end - begin
            hidden = state[direction, :rows]
            torch.mm(hidden, weights.hidden.t(), out=product[:rows])
            recurrence.cell_forward(
                CellForward(
                    rows=rows,
                    gates=gates[direction, begin:end],
                    product=product[:rows],
                    save_gates=saved_cells is not None,
                    cells=cells[direction, :rows],
                    saved_cells=None if saved_cells is None else saved_cells[direction, begin:end],
                    hidden_out=unprojected[:rows] if weights.projection is not None else hidden,
                    output=None if weights.projection is not None else outputs[begin:end],
                )
            )
            if weights.projection is not None:
                torch.mm(unprojected[:rows], weights.projection.t(), out=hidden)
                outputs[begin:end] = hidden
    return state


def _stepwise_backward(layer: Layer, recurrence: Recurrence, run: BackwardRun) -> Gradients:
    gates = torch.empty_like(run.gates)
    if run.final_hidden_gradient is None:
        state = torch.zeros_like(layer.initial_hidden)
    else:
        state = run.final_hidden_gradient.clone()
    projected = unprojected = None
    if layer.is_projected:
        projected = layer.empty(layer.directions, layer.tokens, layer.outputs)
        unprojected = layer.empty(layer.directions, layer.tokens, layer.hidden)
    through = layer.empty(layer.batch, layer.hidden)
    for direction, weights in enumerate(layer.weights):
        initial_cell = layer.initial_cell[direction].to(run.cells.dtype)
        cells_before = layer.before(direction, initial_cell, run.cells[direction])
        of_outputs = None
        if run.output_gradient is not None:
            of_outputs = layer.of_direction(run.output_gradient, direction)
        for begin, end in layer.order(1 - direction):
            rows = end - begin
            hidden = state[direction, :rows]
            outside = None if of_outputs is None else of_outputs[begin:end]
            if weights.projection is not None and projected is not None:
                both = projected[direction, begin:end]
                both.copy_(hidden)
                if outside is not None:
                    both += outside
                torch.mm(both, weights.projection, out=through[:rows])
            recurrence.cell_backward(
                CellBackward(
                    rows=rows,
                    gates=run.gates[direction, begin:end],
                    cells=run.cells[direction, begin:end],
                    cells_before=cells_before[begin:end],
                    hidden_gradient=hidden if unprojected is None else through[:rows],
                    output_gradient=outside if unprojected is None else None,
                    cell_gradient=run.cell_gradient[direction, :rows],
                    gate_gradient=gates[direction, begin:end],
                    hidden_out=None if unprojected is None else unprojected[direction, begin:end],
                )
            )
            torch.mm(gates[direction, begin:end], weights.hidden, out=hidden)
    return Gradients(gates, state, projected, unprojected)


def _products(
    layer: Layer,
    gradients: Gradients,
    cell_gradient: Tensor,
    output: Tensor,
    input: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Products over all tokens: gradients of the input and of the weights."""
    results: list[Tensor] = []
    if wanted[0]:
        of_input = torch.mm(gradients.gates[0], layer.weights[0].input)
        for gates, weights in zip(gradients.gates[1:], layer.weights[1:], strict=True):
            of_input.addmm_(gates, weights.input)
        results.append(of_input.view(input.shape))
    if wanted[1]:
        results.append(gradients.initial_hidden)
    if wanted[2]:
        results.append(cell_gradient.to(layer.dtype))
    has_biases = layer.weights[0].input_bias is not None
    weights_wanted = with_gaps(wanted[3:], layer.directions, has_biases)
    for direction, gates in enumerate(gradients.gates):
        own = Weights(*weights_wanted[5 * direction : 5 * direction + 5])
        if own.input:
            results.append(torch.mm(gates.t(), layer.input))
        if own.hidden:
            initial = layer.initial_hidden[direction]
            before = layer.before(direction, initial, layer.of_direction(output, direction))
            results.append(torch.mm(gates.t(), before))
        if own.input_bias or own.hidden_bias:
            summed = gates.sum(0, dtype=compute_dtype(layer.dtype)).to(layer.dtype)
            results += [summed] if own.input_bias else []
            results += [summed.clone()] if own.hidden_bias else []
        if own.projection and gradients.projected is not None and gradients.unprojected is not None:
            of_projection = gradients.projected[direction].t()
            results.append(torch.mm(of_projection, gradients.unprojected[direction]))
    return results

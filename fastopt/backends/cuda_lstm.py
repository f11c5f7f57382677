"""The LSTM of backend ``cuda``: one layer forward and backward.

Torch multiplies over all tokens at once, before and after the recurrence. The recurrence itself is
one launch of a kernel whose blocks keep the weights in registers and wait for each other once a
step; where that does not fit, a product and a small kernel for each step.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda_context import is_capturing, multiplies_in_tf32, stream_of
from fastopt.backends.lstm_requests import result_shapes, with_gaps
from fastopt.backends.plain_tensors import (
    DLPACK_DEVICES,
    REAL_DTYPES,
    autocast_dtype,
    compute_dtype,
)

# Modules, dtypes and cards whose kernels are there.
_loaded: set[tuple[ModuleType, torch.dtype, int]] = set()


def load(native: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Loads the kernels of a dtype on a card, once."""
    key = native, dtype, device.index or 0
    if key not in _loaded:
        native.load_lstm_kernels(REAL_DTYPES.index(dtype), key[2])
        _loaded.add(key)


def refuse_capture(native: ModuleType, request: LstmRequest) -> str | None:
    """Why a graph that is being captured cannot take these layers, or None."""
    if not is_capturing(request.device):
        return None
    if request.batch_sizes is not None:
        return "the steps of packed sequences cannot be copied inside a graph's capture"
    dtype = autocast_dtype(request.device) or request.input.dtype
    if (native, dtype, request.device.index or 0) not in _loaded:
        return "a graph's capture needs a call before it, which loads the kernels"
    return None


# How a kernel spreads: parts of the batch, rows of a part, whether both directions run at once, and
# how many blocks share the columns of a product.
Grid = tuple[int, int, bool, int]


class Weights(NamedTuple):
    """Of one direction; None for what is not there."""

    input: Tensor  # [4 * hidden, features]
    hidden: Tensor  # [4 * hidden, outputs]
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None  # [outputs, hidden]


class Layer:
    """One layer over one batch.

    Attributes:
        input: ``[tokens, features]``.
        first_token: Of each step, and the number of tokens.
        weights: One for each direction.
    """

    def __init__(self, native: ModuleType, request: LstmRequest) -> None:
        input, batch_sizes = request.input, request.batch_sizes
        initial_hidden, initial_cell = request.initial_hidden, request.initial_cell
        self.directions, self.batch, self.outputs = initial_hidden.shape
        self.hidden = initial_cell.size(2)
        self.initial_hidden, self.initial_cell = (
            state.contiguous() for state in (initial_hidden, initial_cell)
        )
        self.dtype, self.device = input.dtype, input.device
        self._sizes = batch_sizes
        if batch_sizes is None:
            if input.dim() != 3 or input.size(1) != self.batch:
                raise ValueError("input must be [steps, batch, features]")
            self.first_token = list(range(0, len(input) * self.batch + 1, self.batch))
            table = None
        else:
            self.first_token = _checked_steps(batch_sizes, input, self.batch)
            table = torch.tensor(self.first_token, device=self.device)
        self.steps, self.tokens = len(self.first_token) - 1, self.first_token[-1]
        self.input = input.reshape(self.tokens, input.size(-1))
        dense = [weight.contiguous() for weight in request.weights]
        filled = with_gaps(dense, self.directions, request.has_biases)
        self.weights = [Weights(*filled[i : i + 5]) for i in range(0, len(filled), 5)]
        self.is_projected = self.weights[0].projection is not None
        load(native, self.dtype, self.device)
        self.native = native.LstmLayer(
            REAL_DTYPES.index(self.dtype),
            DLPACK_DEVICES[self.device.type],
            self.device.index or 0,
            self.directions,
            self.steps,
            self.batch,
            self.tokens,
            self.hidden,
            table,
        )
        self._table = table

    @property
    def tf32(self) -> bool:
        """Whether fp32 is multiplied so."""
        return self.dtype is torch.float32 and multiplies_in_tf32()

    @property
    def stream(self) -> int:
        """The current one."""
        return stream_of(self.device)

    def grid(self, *, backward: bool) -> Grid | None:
        """How the persistent kernel of a pass spreads over the card; None where it does not fit."""
        if self.is_projected or self.dtype is torch.float64:
            return None
        grid: Grid = self.native.grid(backward, self.tf32)
        return grid if grid[0] > 0 else None

    def workspaces(self, grid: Grid, *, backward: bool) -> dict[str, Any]:
        """The arguments that both passes of the persistent kernel share."""
        width = self.native.exchange_width(backward)
        shape = (2, self.directions, self.batch, width)
        counters, _ = self.native.workspace(grid)
        return {
            "grid": grid,
            "tf32": self.tf32,
            "weights": [weights.hidden for weights in self.weights],
            "exchange": torch.zeros(shape, dtype=self.dtype, device=self.device),
            "counters": torch.zeros(counters, dtype=torch.int32, device=self.device),
            "stream": self.stream,
        }

    def empty(self, *shape: int) -> Tensor:
        """Of the layer's dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def of_direction(self, values: Tensor, direction: int) -> Tensor:
        """Those of ``[tokens, directions * outputs]``."""
        return values[:, direction * self.outputs : (direction + 1) * self.outputs]

    def order(self, direction: int) -> Iterator[tuple[int, int]]:
        """First token and end of the steps, as a direction comes by them."""
        pairs = list(itertools.pairwise(self.first_token))
        return iter(pairs if direction == 0 else pairs[::-1])

    def before(self, direction: int, initial: Tensor, values: Tensor) -> Tensor:
        """What a direction had before each token: an initial state, or the value at another token.

        Args:
            direction: 0, or 1 for the reverse one.
            initial: ``[batch, width]``.
            values: ``[tokens, width]``.

        Returns:
            ``[tokens, width]``.
        """
        if self._sizes is None:
            last = self.tokens - self.batch
            parts = [initial, values[:last]] if direction == 0 else [values[self.batch :], initial]
            return torch.cat(parts)
        return torch.cat([initial, values]).index_select(0, self._indices_before(direction))

    def _indices_before(self, direction: int) -> Tensor:
        assert self._sizes is not None
        first = torch.tensor(self.first_token, device="cpu")
        sizes = first.diff(append=first[-1:])  # none behind the last step
        step = torch.repeat_interleave(self._sizes)
        row = torch.arange(self.tokens, device="cpu") - first[step]
        neighbour = step - 1 if direction == 0 else step + 1
        exists = neighbour >= 0 if direction == 0 else row < sizes[neighbour]
        index = torch.where(exists, self.batch + first[neighbour.clamp(min=0)] + row, row)
        return index.to(self.device)


def _checked_steps(batch_sizes: Tensor, input: Tensor, batch: int) -> list[int]:
    """First tokens of steps whose rows do not grow in number."""
    sizes = batch_sizes.tolist()
    if input.dim() != 2:
        raise ValueError("input must be [tokens, features]")
    if any(rows < 1 for rows in sizes) or any(b > a for a, b in itertools.pairwise(sizes)):
        raise ValueError("batch_sizes must be positive and must not grow")
    if not sizes or sizes[0] != batch:
        raise ValueError("batch_sizes must begin with the batch of the states")
    if sum(sizes) != len(input):
        raise ValueError("batch_sizes must sum to the tokens of the input")
    return [0, *itertools.accumulate(sizes)]


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What arrives has been cast already."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def forward(native: ModuleType, request: LstmRequest, save: bool) -> tuple[Tensor, ...]:
    """Runs one layer; see ``Kernels``."""
    with _without_autocast(request.device):
        layer = Layer(native, request)
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
        run = gates, cells, saved_cells if save else None, output
        grid = layer.grid(backward=False)
        if grid is not None:
            final_hidden = _persistent_forward(layer, grid, *run)
        else:
            final_hidden = _stepwise_forward(layer, *run)
        saved_gates = gates if save else layer.empty(layer.directions, 0, 4 * layer.hidden)
        final_cell = cells.to(layer.dtype)
        return output.view(output_shape), final_hidden, final_cell, saved_gates, saved_cells


def _persistent_forward(
    layer: Layer,
    grid: Grid,
    gates: Tensor,
    cells: Tensor,
    saved_cells: Tensor | None,
    output: Tensor,
) -> Tensor:
    final_hidden = torch.empty_like(layer.initial_hidden)
    layer.native.forward(
        **layer.workspaces(grid, backward=False),
        gates=gates,
        save_gates=saved_cells is not None,
        initial_hidden=layer.initial_hidden,
        cells=cells,
        output=output,
        final_hidden=final_hidden,
        saved_cells=saved_cells,
    )
    return final_hidden


def _stepwise_forward(
    layer: Layer, gates: Tensor, cells: Tensor, saved_cells: Tensor | None, output: Tensor
) -> Tensor:
    state = layer.initial_hidden.clone()
    product = layer.empty(layer.batch, 4 * layer.hidden)
    unprojected = layer.empty(layer.batch, layer.hidden)
    stream = layer.stream
    for direction, weights in enumerate(layer.weights):
        outputs = layer.of_direction(output, direction)
        for begin, end in layer.order(direction):
            rows = end - begin
            hidden = state[direction, :rows]
            torch.mm(hidden, weights.hidden.t(), out=product[:rows])
            layer.native.cell_forward(
                rows=rows,
                gates=gates[direction, begin:end],
                product=product[:rows],
                save_gates=saved_cells is not None,
                cells=cells[direction, :rows],
                saved_cells=None if saved_cells is None else saved_cells[direction, begin:end],
                hidden_out=unprojected[:rows] if weights.projection is not None else hidden,
                output=None if weights.projection is not None else outputs[begin:end],
                stream=stream,
            )
            if weights.projection is not None:
                torch.mm(unprojected[:rows], weights.projection.t(), out=hidden)
                outputs[begin:end] = hidden
    return state


class Gradients(NamedTuple):
    """What the backward recurrence leaves; products over all tokens follow."""

    gates: Tensor  # [directions, tokens, 4 * hidden], of the pre-activations
    initial_hidden: Tensor
    initial_cell: Tensor  # in the type of the arithmetic
    # Of the projection, [directions, tokens, outputs] and what it was given, [..., hidden].
    projected: Tensor | None
    unprojected: Tensor | None


def backward(
    native: ModuleType,
    request: LstmRequest,
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of input, initial states and weights that are wanted, in this order."""
    output_gradient, final_hidden_gradient, final_cell_gradient = gradients
    output, saved_gates, saved_cells = saved
    input, initial_cell = request.input, request.initial_cell
    with _without_autocast(input.device):
        layer = Layer(native, request)
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
        run = output_gradient, final_hidden_gradient, cells, saved_gates, saved_cells
        grid = layer.grid(backward=True)
        if grid is not None:
            found = _persistent_backward(layer, grid, *run)
        else:
            found = _stepwise_backward(layer, *run)
        return _products(layer, found, output.reshape(layer.tokens, width), input, wanted)


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be contiguous, of shape {list(shape)}")


def _persistent_backward(
    layer: Layer,
    grid: Grid,
    output_gradient: Tensor | None,
    final_hidden_gradient: Tensor | None,
    cell_gradient: Tensor,
    saved_gates: Tensor,
    saved_cells: Tensor,
) -> Gradients:
    gates, initial_hidden = torch.empty_like(saved_gates), torch.empty_like(layer.initial_hidden)
    _, sums = layer.native.workspace(grid)
    layer.native.backward(
        **layer.workspaces(grid, backward=True),
        gates=saved_gates,
        saved_cells=saved_cells,
        initial_cell=layer.initial_cell,
        output_gradient=output_gradient,
        final_hidden_gradient=final_hidden_gradient,
        cell_gradient=cell_gradient,
        gate_gradient=gates,
        initial_hidden_gradient=initial_hidden,
        partial_sums=cell_gradient.new_empty(sums) if sums else None,
    )
    return Gradients(gates, initial_hidden, cell_gradient, None, None)


def _stepwise_backward(
    layer: Layer,
    output_gradient: Tensor | None,
    final_hidden_gradient: Tensor | None,
    cell_gradient: Tensor,
    saved_gates: Tensor,
    saved_cells: Tensor,
) -> Gradients:
    gates = torch.empty_like(saved_gates)
    if final_hidden_gradient is None:
        state = torch.zeros_like(layer.initial_hidden)
    else:
        state = final_hidden_gradient.clone()
    projected = unprojected = None
    if layer.is_projected:
        projected = layer.empty(layer.directions, layer.tokens, layer.outputs)
        unprojected = layer.empty(layer.directions, layer.tokens, layer.hidden)
    through = layer.empty(layer.batch, layer.hidden)
    stream = layer.stream
    for direction, weights in enumerate(layer.weights):
        initial_cell = layer.initial_cell[direction].to(saved_cells.dtype)
        cells_before = layer.before(direction, initial_cell, saved_cells[direction])
        of_outputs = None
        if output_gradient is not None:
            of_outputs = layer.of_direction(output_gradient, direction)
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
            layer.native.cell_backward(
                rows=rows,
                gates=saved_gates[direction, begin:end],
                cells=saved_cells[direction, begin:end],
                cells_before=cells_before[begin:end],
                hidden_gradient=hidden if unprojected is None else through[:rows],
                output_gradient=outside if unprojected is None else None,
                cell_gradient=cell_gradient[direction, :rows],
                gate_gradient=gates[direction, begin:end],
                hidden_out=None if unprojected is None else unprojected[direction, begin:end],
                stream=stream,
            )
            torch.mm(gates[direction, begin:end], weights.hidden, out=hidden)
    return Gradients(gates, state, cell_gradient, projected, unprojected)


def _products(
    layer: Layer, gradients: Gradients, output: Tensor, input: Tensor, wanted: Sequence[bool]
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
        results.append(gradients.initial_cell.to(layer.dtype))
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

"""The LSTM's recurrence on backend ``triton``: a launch for each step, of all directions.

A program owns some hidden units of some rows: it multiplies what the step before has left by its
share of the recurrent weights, and applies the gates. Programs of a step never read what others of
that step write: hidden states come from the output of the step before, gradients of gates from that
of the step after. Projections and fp64 leave the products to torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import lstm_passes
from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda_context import is_capturing, multiplies_in_tf32
from fastopt.backends.lstm_layer import Layer
from fastopt.backends.lstm_passes import (
    BackwardRun,
    CellBackward,
    CellForward,
    ForwardRun,
    Gradients,
)
from fastopt.backends.lstm_requests import CAPTURE_NEEDS_A_CALL, refuse_capture, refuse_lstm
from fastopt.backends.plain_tensors import autocast_dtype
from fastopt.backends.triton import launch
from fastopt.backends.triton.lstm_tiles import tile_of

# Of a step without its product: one program's, and eight for each of its threads.
_ELEMENTS, _CELL_WARPS = 512, 2


def refuse(request: LstmRequest, device: str) -> str | None:
    """Why the kernels do not run these layers, or None."""
    return refuse_lstm(request, device) or refuse_capture(request, lambda: _is_loaded(request))


def _is_loaded(request: LstmRequest) -> bool:
    """Whether what these layers need has run before, the backward pass too where it will follow."""
    tensors = [request.input, request.initial_hidden, request.initial_cell, *request.weights]
    is_trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    passes = ("forward", "backward") if is_trained else ("forward",)
    dtype = autocast_dtype(request.device) or request.input.dtype
    return all(launch.is_loaded(request.device, *_key(name, request, dtype)) for name in passes)


def _key(name: str, request: LstmRequest, dtype: torch.dtype) -> tuple[Any, ...]:
    """What tells compiled kernels of a pass apart."""
    _, batch, outputs = request.initial_hidden.shape
    sizes = batch, outputs, request.initial_cell.size(2), request.bidirectional
    return f"lstm {name}", dtype, multiplies_in_tf32(), *sizes


@contextlib.contextmanager
def _loading(name: str, request: LstmRequest) -> Iterator[None]:
    """Around a pass, whose first call compiles kernels."""
    key = _key(name, request, request.input.dtype)
    if is_capturing(request.device) and not launch.is_loaded(request.device, *key):
        raise RuntimeError(CAPTURE_NEEDS_A_CALL)  # of compiled code, say
    yield
    launch.mark_loaded(request.device, *key)


def forward(request: LstmRequest, save: bool) -> tuple[Tensor, ...]:
    """Output, final states and, with ``save``, what the backward pass needs of one layer."""
    with _loading("forward", request):
        return lstm_passes.forward(request, save, TritonRecurrence)


def backward(
    request: LstmRequest,
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of input, initial states and weights that are wanted, in this order."""
    with _loading("backward", request):
        return lstm_passes.backward(request, gradients, saved, wanted, TritonRecurrence)


class TritonRecurrence:
    """The kernels, for one layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._kernels = launch.kernels("lstm")

    @property
    def _is_fused(self) -> bool:
        return not self._layer.is_projected and self._layer.dtype is not torch.float64

    def _weights(self) -> Tensor:
        """``[directions, 4 * hidden, hidden]``."""
        weights = [own.hidden for own in self._layer.weights]
        return torch.stack(weights) if len(weights) > 1 else weights[0]

    def _launch_steps(
        self, name: str, tensors: Sequence[Tensor], flag: bool, steps: Iterator[tuple[int, ...]]
    ) -> None:
        """Launches a pass's kernel for each step; numbers of both directions follow each other."""
        layer = self._layer
        tile = tile_of(name, layer)
        blocks = -(-layer.hidden // tile.units)

        def launches() -> Iterator[tuple[tuple[int, int, int], Sequence[int]]]:
            for step in steps:
                rows = max(step[1], step[len(step) // 2 + 1])
                grid = blocks, -(-rows // tile.rows), layer.directions
                yield grid, (layer.tokens, layer.batch, int(flag), *step)

        launch.launch_series(
            getattr(self._kernels, f"_lstm_{name}_kernel"),
            launches(),
            layer.device,
            *tensors,
            num_warps=tile.warps,
            num_stages=tile.stages,
            HIDDEN=layer.hidden,
            DIRECTIONS=layer.directions,
            ROWS=tile.rows,
            UNITS=tile.units,
            DEPTH=tile.depth,
            PRECISION="tf32" if layer.tf32 else "ieee",
        )

    def forward(self, run: ForwardRun) -> Tensor | None:
        """A launch for each step."""
        layer = self._layer
        if not self._is_fused:
            return None
        final_hidden = torch.empty_like(layer.initial_hidden)
        for direction, own in enumerate(layer.weights):
            # No kernel has to know of initial states: their product joins that of the input.
            pre, first = run.gates[direction], layer.last_tokens(1 - direction)
            pre[first] = torch.addmm(pre[first], layer.initial_hidden[direction], own.hidden.t())
        save = run.saved_cells is not None
        saved_cells = run.cells if run.saved_cells is None else run.saved_cells
        tensors = run.gates, self._weights(), run.cells, saved_cells, run.output
        directions = [_steps(layer, direction) for direction in range(layer.directions)]
        self._launch_steps("forward", tensors, save, _side_by_side(directions))
        for direction, final in enumerate(final_hidden):
            output = layer.of_direction(run.output, direction)
            final.copy_(output[layer.last_tokens(direction)])
        return final_hidden

    def backward(self, run: BackwardRun) -> Gradients | None:
        """A launch for each step."""
        layer = self._layer
        if not self._is_fused:
            return None
        gates, initial_hidden = torch.empty_like(run.gates), torch.empty_like(layer.initial_hidden)
        output_gradient, final_hidden_gradient = run.output_gradient, run.final_hidden_gradient
        if output_gradient is None:
            output_gradient = run.gates.new_zeros(layer.directions * layer.hidden)
        if final_hidden_gradient is None:
            final_hidden_gradient = torch.zeros_like(layer.initial_hidden)
        tensors = (
            run.gates,
            run.cells,
            layer.initial_cell,
            self._weights(),
            output_gradient,
            final_hidden_gradient,
            run.cell_gradient,
            gates,
        )
        directions = [_steps_back(layer, direction) for direction in range(layer.directions)]
        has_output_gradient = run.output_gradient is not None
        self._launch_steps("backward", tensors, has_output_gradient, _side_by_side(directions))
        for direction, own in enumerate(layer.weights):
            first = layer.last_tokens(1 - direction)
            torch.mm(gates[direction, first], own.hidden, out=initial_hidden[direction])
        return Gradients(gates, initial_hidden, None, None)

    def cell_forward(self, step: CellForward) -> None:
        """One launch."""
        self._launch_cells(
            self._kernels._lstm_cell_forward_kernel,
            *(step.rows, step.gates, step.product, step.cells, step.saved_cells),
            *(step.hidden_out, step.output, 0 if step.output is None else step.output.stride(0)),
            SAVE=step.save_gates,
        )

    def cell_backward(self, step: CellBackward) -> None:
        """One launch."""
        outside = step.output_gradient
        self._launch_cells(
            self._kernels._lstm_cell_backward_kernel,
            *(step.rows, step.gates, step.cells, step.cells_before, step.hidden_gradient),
            *(outside, 0 if outside is None else outside.stride(0)),
            *(step.cell_gradient, step.gate_gradient, step.hidden_out),
        )

    def _launch_cells(self, kernel: Any, rows: int, *arguments: Any, **constants: Any) -> None:
        hidden = self._layer.hidden
        launch.launch(
            kernel, (-(-rows * hidden // _ELEMENTS),), self._layer.device, rows, *arguments,
            HIDDEN=hidden, ELEMENTS=_ELEMENTS, num_warps=_CELL_WARPS, **constants,
        )  # fmt: skip


def _steps(layer: Layer, direction: int) -> Iterator[tuple[int, ...]]:
    """First token and rows of each step, as a direction comes by them, and of the step before.

    Of the step before, they are the rows that both have.
    """
    before = rows_before = 0
    for begin, end in layer.order(direction):
        rows = end - begin
        yield begin, rows, before, min(rows, rows_before)
        before, rows_before = begin, rows


def _steps_back(layer: Layer, direction: int) -> Iterator[tuple[int, ...]]:
    """The same from the last step on, and behind it the same of the step after."""
    steps = reversed(list(_steps(layer, direction)))
    for step, (_, _, *after) in zip(steps, _steps(layer, 1 - direction), strict=True):
        yield *step, *after


def _side_by_side(directions: Sequence[Iterable[tuple[int, ...]]]) -> Iterator[tuple[int, ...]]:
    """The numbers of both directions, step by step; the only one's come twice."""
    for step in zip(*directions, strict=True):
        yield step[0] + step[-1]

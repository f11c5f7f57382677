"""The LSTM's recurrence on backend ``cuda``.

It is one launch of a kernel whose blocks keep the weights in registers and wait for each other once
a step; where that does not fit, a product and a small kernel for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import lstm_passes
from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda_context import stream_of
from fastopt.backends.lstm_layer import Layer
from fastopt.backends.lstm_passes import (
    BackwardRun,
    CellBackward,
    CellForward,
    ForwardRun,
    Gradients,
)
from fastopt.backends.lstm_requests import refuse_capture, refuse_lstm
from fastopt.backends.plain_tensors import DLPACK_DEVICES, REAL_DTYPES, autocast_dtype

# Modules, dtypes and cards whose kernels are there.
_loaded: set[tuple[ModuleType, torch.dtype, int]] = set()


def load(native: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Loads the kernels of a dtype on a card, once."""
    key = native, dtype, device.index or 0
    if key not in _loaded:
        native.load_lstm_kernels(REAL_DTYPES.index(dtype), key[2])
        _loaded.add(key)


def refuse(native: ModuleType, request: LstmRequest, device: str) -> str | None:
    """Why the kernels do not run these layers, or None."""

    def is_loaded() -> bool:
        dtype = autocast_dtype(request.device) or request.input.dtype
        return (native, dtype, request.device.index or 0) in _loaded

    return refuse_lstm(request, device) or refuse_capture(request, is_loaded)


def forward(native: ModuleType, request: LstmRequest, save: bool) -> tuple[Tensor, ...]:
    """Output, final states and, with ``save``, what the backward pass needs of one layer."""
    return lstm_passes.forward(request, save, functools.partial(CudaRecurrence, native))


def backward(
    native: ModuleType,
    request: LstmRequest,
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of input, initial states and weights that are wanted, in this order."""
    recurrence_of = functools.partial(CudaRecurrence, native)
    return lstm_passes.backward(request, gradients, saved, wanted, recurrence_of)


# How a kernel spreads: parts of the batch, rows of a part, whether both directions run at once, and
# how many blocks share the columns of a product.
Grid = tuple[int, int, bool, int]


class CudaRecurrence:
    """The kernels of the native module, for one layer."""

    def __init__(self, native: ModuleType, layer: Layer) -> None:
        load(native, layer.dtype, layer.device)
        table = None
        if layer.is_packed:
            table = torch.tensor(layer.first_token, device=layer.device)
        self._layer, self._table = layer, table
        self._stream = stream_of(layer.device)
        self.native = native.LstmLayer(
            REAL_DTYPES.index(layer.dtype),
            DLPACK_DEVICES[layer.device.type],
            layer.device.index or 0,
            layer.directions,
            layer.steps,
            layer.batch,
            layer.tokens,
            layer.hidden,
            table,
        )

    def grid(self, *, backward: bool) -> Grid | None:
        """How the persistent kernel of a pass spreads over the card; None where it does not fit."""
        if self._layer.is_projected or self._layer.dtype is torch.float64:
            return None
        grid: Grid = self.native.grid(backward, self._layer.tf32)
        return grid if grid[0] > 0 else None

    def _workspaces(self, grid: Grid, *, backward: bool) -> dict[str, Any]:
        """The arguments that both passes of the persistent kernel share."""
        layer = self._layer
        width = self.native.exchange_width(backward)
        shape = (2, layer.directions, layer.batch, width)
        counters, _ = self.native.workspace(grid)
        return {
            "grid": grid,
            "tf32": layer.tf32,
            "weights": [weights.hidden for weights in layer.weights],
            "exchange": torch.zeros(shape, dtype=layer.dtype, device=layer.device),
            "counters": torch.zeros(counters, dtype=torch.int32, device=layer.device),
            "stream": self._stream,
        }

    def forward(self, run: ForwardRun) -> Tensor | None:
        """One launch, where it fits."""
        grid = self.grid(backward=False)
        if grid is None:
            return None
        final_hidden = torch.empty_like(self._layer.initial_hidden)
        self.native.forward(
            **self._workspaces(grid, backward=False),
            **run._asdict(),
            save_gates=run.saved_cells is not None,
            initial_hidden=self._layer.initial_hidden,
            final_hidden=final_hidden,
        )
        return final_hidden

    def backward(self, run: BackwardRun) -> Gradients | None:
        """One launch, where it fits."""
        grid = self.grid(backward=True)
        if grid is None:
            return None
        gates = torch.empty_like(run.gates)
        initial_hidden = torch.empty_like(self._layer.initial_hidden)
        _, sums = self.native.workspace(grid)
        self.native.backward(
            **self._workspaces(grid, backward=True),
            gates=run.gates,
            saved_cells=run.cells,
            initial_cell=self._layer.initial_cell,
            output_gradient=run.output_gradient,
            final_hidden_gradient=run.final_hidden_gradient,
            cell_gradient=run.cell_gradient,
            gate_gradient=gates,
            initial_hidden_gradient=initial_hidden,
            partial_sums=run.cell_gradient.new_empty(sums) if sums else None,
        )
        return Gradients(gates, initial_hidden, None, None)

    def cell_forward(self, step: CellForward) -> None:
        """One launch."""
        self.native.cell_forward(**step._asdict(), stream=self._stream)

    def cell_backward(self, step: CellBackward) -> None:
        """One launch."""
        self.native.cell_backward(**step._asdict(), stream=self._stream)

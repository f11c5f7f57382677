"""LSTMs, their inputs and losses as data: a new configuration is one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastopt import nn
from tolerances import assert_matches, assert_no_worse_than_stock

States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LstmCase:
    """One module with the shape of its input.

    Attributes:
        name: The test's id.
        input_size: Features of a step.
        hidden_size: Of the cell.
        options: The constructor's other arguments.
        seq_len: Steps; of the longest sequence where ``lengths`` are given.
        batch: Sequences, or None for input without that dimension.
        lengths: Those of a packed input, sorted or not, or None for a padded one.
        initial: Whether trainable initial states are given.
        layout: Key of ``LAYOUTS``.
    """

    name: str
    input_size: int = 5
    hidden_size: int = 17
    options: dict[str, Any] = field(default_factory=dict)
    seq_len: int = 6
    batch: int | None = 3
    lengths: tuple[int, ...] | None = None
    initial: bool = False
    layout: str = "contiguous"

    @property
    def time_dim(self) -> int:
        """Where input and output count the steps."""
        return 1 if self.options.get("batch_first") and self.batch is not None else 0

    def stock(self, dtype: torch.dtype) -> torch.nn.LSTM:
        """Torch's module, the same one every time."""
        torch.manual_seed(1)
        wide = torch.nn.LSTM(self.input_size, self.hidden_size, **self.options, dtype=torch.float64)
        return wide.to(dtype)

    def pair(self, dtype: torch.dtype, **more: Any) -> tuple[nn.LSTM, torch.nn.LSTM]:
        """Ours on the native kernel, where ``more`` says nothing else, and stock: equal weights."""
        stock = self.stock(dtype)
        ours = nn.LSTM(
            self.input_size,
            self.hidden_size,
            **self.options,
            dtype=dtype,
            **{"backend": "cpu", **more},
        )
        ours.load_state_dict(stock.state_dict())
        return ours, stock

    def sample(self, dtype: torch.dtype) -> Sample:
        """The input, the same one every time, in the layout of the case."""
        generator = torch.Generator().manual_seed(2)
        batch = 1 if self.batch is None else self.batch
        shape = (batch, self.seq_len) if self.time_dim else (self.seq_len, batch)
        leaf, view = LAYOUTS[self.layout](*shape, self.input_size)
        data = torch.randn(leaf, generator=generator, dtype=torch.float64).to(dtype)
        if self.batch is None:
            data = data.squeeze(1)
        if not self.initial:
            return Sample(data.requires_grad_(), None, view, self)
        rows = self.options.get("num_layers", 1) * (1 + self.options.get("bidirectional", False))
        sizes = (self.options.get("proj_size") or self.hidden_size, self.hidden_size)
        states = [
            torch.randn(rows, batch, size, generator=generator, dtype=torch.float64).to(dtype)
            for size in sizes
        ]
        h_0, c_0 = (s.squeeze(1) if self.batch is None else s for s in states)
        states_given = (h_0.requires_grad_(), c_0.requires_grad_())
        return Sample(data.requires_grad_(), states_given, view, self)


class Sample(NamedTuple):
    """What a module is called with; ``leaf`` has the gradient, ``view`` makes the input of it."""

    leaf: Tensor
    states: States | None
    view: Callable[[Tensor], Tensor]
    case: LstmCase

    def double(self) -> Sample:
        """The same numbers in double precision."""
        states = self.states and tuple(s.detach().double().requires_grad_() for s in self.states)
        return self._replace(leaf=self.leaf.detach().double().requires_grad_(), states=states)

    def to(self, device: str) -> Sample:
        """The same numbers on a device."""
        states = self.states and tuple(s.detach().to(device).requires_grad_() for s in self.states)
        leaf = self.leaf.detach().to(device).requires_grad_()
        return self._replace(leaf=leaf, states=states)

    def arguments(self) -> tuple[Any, ...]:
        """For the module's call."""
        data: Any = self.view(self.leaf)
        if self.case.lengths is not None:
            data = pack_padded_sequence(
                data,
                torch.tensor(self.case.lengths),
                batch_first=self.case.time_dim == 1,
                enforce_sorted=False,
            )
        return (data,) if self.states is None else (data, self.states)


# The shape of a leaf for an input of the shape given, and what makes that input of the leaf.
Layout = tuple[tuple[int, ...], Callable[[Tensor], Tensor]]
LAYOUTS: dict[str, Callable[[int, int, int], Layout]] = {
    "contiguous": lambda a, b, c: ((a, b, c), lambda leaf: leaf),
    "transposed": lambda a, b, c: ((b, a, c), lambda leaf: leaf.transpose(0, 1)),
    "features first": lambda a, b, c: ((c, a, b), lambda leaf: leaf.permute(1, 2, 0)),
    "expanded": lambda a, b, c: ((a, 1, c), lambda leaf: leaf.expand(a, b, c)),
    "strided": lambda a, b, c: ((a, b, 2 * c), lambda leaf: leaf[..., ::2]),
    "slice": lambda a, b, c: ((a + 2, b + 1, c + 3), lambda leaf: leaf[1:-1, 1:, 3:]),
    "misaligned": lambda a, b, c: ((a * b * c + 1,), lambda leaf: leaf[1:].view(a, b, c)),
}

# What a loss reads of output, h_n and c_n.
Reader = Callable[[LstmCase, Tensor, Tensor, Tensor], list[Tensor]]
LOSSES: dict[str, Reader] = {
    "all": lambda case, output, h_n, c_n: [output, h_n, c_n],
    "output": lambda case, output, h_n, c_n: [output],
    "last step": lambda case, output, h_n, c_n: [output.select(case.time_dim, -1)],
    "h_n": lambda case, output, h_n, c_n: [h_n],
    "c_n": lambda case, output, h_n, c_n: [c_n],
    "c_n and first step": lambda case, output, h_n, c_n: [c_n, output.select(case.time_dim, 0)],
    "last layer's h_n": lambda case, output, h_n, c_n: [h_n[-1]],
}


def weighted(parts: list[Tensor]) -> Tensor:
    """A sum with fixed weights, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        weights = torch.randint(-8, 9, part.shape, generator=generator).double() / 4
        total = total + (part.double() * weights.to(part.device)).sum()
    return total


def forward(lstm: torch.nn.LSTM, sample: Sample) -> dict[str, Tensor]:
    """The outputs by name; of a packed one its data and the order of its sequences."""
    output, (h_n, c_n) = lstm(*sample.arguments())
    if not isinstance(output, PackedSequence):
        return {"output": output, "h_n": h_n, "c_n": c_n}
    outputs = {"output": output.data, "h_n": h_n, "c_n": c_n, "batch_sizes": output.batch_sizes}
    return {**outputs, "unsorted_indices": output.unsorted_indices}


def gradients(lstm: torch.nn.LSTM, sample: Sample) -> dict[str, Tensor]:
    """Those that arrived, of the input, the initial states and every parameter."""
    leaves = {"input": sample.leaf, **dict(lstm.named_parameters())}
    if sample.states is not None:
        leaves |= {"h_0": sample.states[0], "c_0": sample.states[1]}
    return {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def run(lstm: torch.nn.LSTM, sample: Sample, loss: str = "all") -> dict[str, Tensor]:
    """Outputs and gradients of a loss, on the CPU."""
    outputs = forward(lstm, sample)
    read = (outputs["output"], outputs["h_n"], outputs["c_n"])
    weighted(LOSSES[loss](sample.case, *read)).backward()
    results = {name: value.detach() for name, value in outputs.items()} | gradients(lstm, sample)
    return {name: value.cpu() for name, value in results.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Compares outputs and gradients by name."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        op = "lstm gradients" if name.startswith("d ") else "lstm"
        try:
            if value.is_floating_point():
                assert_matches(actual[name], value, op=op, dtype=dtype)
            else:
                assert torch.equal(actual[name], value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def assert_no_worse(
    actual: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Compares by name: dtypes with stock's, errors with twice stock's."""
    assert actual.keys() == stock.keys() == truth.keys()
    for name, value in truth.items():
        assert actual[name].dtype is stock[name].dtype, name
        try:
            if value.is_floating_point():
                assert_no_worse_than_stock(actual[name].detach(), stock[name].detach(), value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def exact(case: LstmCase, dtype: torch.dtype, loss: str = "all") -> dict[str, Tensor]:
    """Stock's results in double precision, of numbers that were rounded to ``dtype``."""
    return run(case.stock(dtype).double(), case.sample(dtype).double(), loss)

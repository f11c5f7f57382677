"""One layer of an LSTM as a card's kernels see it: sizes, weights, and the order of its tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda_context import multiplies_in_tf32
from fastopt.backends.lstm_requests import with_gaps


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
        is_packed: Whether the rows of a step may be fewer than the batch.
        weights: One for each direction.
    """

    def __init__(self, request: LstmRequest) -> None:
        input, batch_sizes = request.input, request.batch_sizes
        initial_hidden, initial_cell = request.initial_hidden, request.initial_cell
        self.directions, self.batch, self.outputs = initial_hidden.shape
        self.hidden = initial_cell.size(2)
        self.initial_hidden, self.initial_cell = (
            state.contiguous() for state in (initial_hidden, initial_cell)
        )
        self.dtype, self.device = input.dtype, input.device
        self._sizes = batch_sizes
        self.is_packed = batch_sizes is not None
        if batch_sizes is None:
            if input.dim() != 3 or input.size(1) != self.batch:
                raise ValueError("input must be [steps, batch, features]")
            self.first_token = list(range(0, len(input) * self.batch + 1, self.batch))
        else:
            self.first_token = _checked_steps(batch_sizes, input, self.batch)
        self.steps, self.tokens = len(self.first_token) - 1, self.first_token[-1]
        self.input = input.reshape(self.tokens, input.size(-1))
        dense = [weight.contiguous() for weight in request.weights]
        filled = with_gaps(dense, self.directions, request.has_biases)
        self.weights = [Weights(*filled[i : i + 5]) for i in range(0, len(filled), 5)]
        self.is_projected = self.weights[0].projection is not None

    @property
    def tf32(self) -> bool:
        """Whether fp32 is multiplied so."""
        return self.dtype is torch.float32 and multiplies_in_tf32()

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

    def last_tokens(self, direction: int) -> Tensor | slice:
        """Where each row of the batch ends for a direction, as an index of ``[tokens, ...]``."""
        if direction == 1:
            return slice(self.batch)
        if self._sizes is None:
            return slice(self.tokens - self.batch, self.tokens)
        row = torch.arange(self.batch, device="cpu")
        steps = (self._sizes.unsqueeze(1) > row).sum(0)
        return (torch.tensor(self.first_token, device="cpu")[steps - 1] + row).to(self.device)


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

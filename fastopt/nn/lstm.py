"""``LSTM``: torch's module on fastopt's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastopt.backends import registry
from fastopt.backends.contract import LstmRequest
from fastopt.ops.arguments import is_number
from fastopt.ops.lstm import FrozenWeights, lstm

__all__ = ["LSTM"]


class LSTM(torch.nn.LSTM):
    """:class:`torch.nn.LSTM` with the same arguments, state and results, on fastopt's kernels.

    Under ``torch.compile`` set ``torch._dynamo.config.allow_rnn = True``: Dynamo refuses every
    module derived from :class:`torch.nn.LSTM` otherwise.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the cell state.
        num_layers: Layers on top of each other.
        bias: Whether there are biases.
        batch_first: Input and output are ``[batch, steps, features]``.
        dropout: Probability of dropping an output of any layer but the last, in training.
        bidirectional: Each layer also runs from the end.
        proj_size: Features of the hidden state, where that is a projection of the cell's output.
        device: Of the parameters.
        dtype: Of the parameters.
        weight_dropout: Probability of dropping an element of the recurrent weights ``weight_hh``,
            in training, drawn once per forward (Merity et al. 2018, "Regularizing and Optimizing
            LSTM Language Models").
        backend: ``auto``, ``cpu``, ``cuda``, ``triton``, ``torch`` (stock's own) or
            ``reference``; None leaves the choice to ``fastopt.use_backend`` and
            ``FASTOPT_BACKEND``.

    Raises:
        ValueError: ``weight_dropout`` is not in [0, 1], ``backend`` is unknown, or as in torch.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        if not (is_number(weight_dropout) and 0 <= weight_dropout <= 1):
            raise ValueError(f"weight_dropout must be in [0, 1], got {weight_dropout!r}")
        if backend is not None:
            registry.check_name(backend)
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.weight_dropout = weight_dropout
        self._backend = backend
        self._frozen: FrozenWeights | None = None

    def freeze(self) -> LSTM:
        """Packs the weights once for all calls to come; otherwise each call packs them.

        For inference with many short calls. The promise that the weights stay as they are is
        checked by identity, address and version counter; a write through ``.data`` goes unnoticed.
        Copies are not frozen; loading, moving and casting end it.

        Returns:
            The module itself.

        Raises:
            RuntimeError: In later calls, where a weight has changed.
        """
        self._update_flat_weights()
        directions = 2 if self.bidirectional else 1
        with torch.no_grad():
            self._frozen = FrozenWeights(
                self._flat_weights_names,
                self._plain_weights(),
                self.bias,
                self.num_layers,
                directions,
            )
        return self

    def unfreeze(self) -> LSTM:
        """Ends what ``freeze`` began.

        Returns:
            The module itself.
        """
        self._frozen = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its own weights."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"_frozen": None}

    def _apply(self, fn: Any, recurse: bool = True) -> LSTM:
        self._frozen = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._frozen = None
        super()._load_from_state_dict(*arguments, **keywords)

    def extra_repr(self) -> str:
        """Torch's, and what differs from its defaults."""
        text: str = super().extra_repr()
        return text + (f", weight_dropout={self.weight_dropout}" if self.weight_dropout else "")

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Runs all layers; shapes, errors and texts are those of :class:`torch.nn.LSTM`.

        Args:
            input: ``[steps, batch, input_size]``, ``[batch, steps, input_size]`` with
                ``batch_first``, ``[steps, input_size]``, or a packed sequence.
            hx: Hidden and cell states to begin with, ``[layers * directions, batch, proj_size or
                hidden_size]`` and ``[layers * directions, batch, hidden_size]``; zeros where not
                given.

        Returns:
            The outputs of the last layer, in the form of the input, and the final states.

        Raises:
            ValueError: The input has another number of dimensions.
            RuntimeError: Sizes do not fit; the module is frozen and a weight has changed.
        """
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            batch = batch_sizes[0]  # raises where there are no steps, as torch's does
            if hx is None:
                hx = self._zero_states(data, int(batch))
            else:
                hx = self.permute_hidden(_two(hx), sorted_indices)
            output, final = self._run(data, batch_sizes, hx)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(final, unsorted_indices)

        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None:
            expected = 3 if batched else 2
            _two(hx)
            if hx[0].dim() != expected or hx[1].dim() != expected:
                kind = "batched 3-D" if batched else "unbatched 2-D"
                raise RuntimeError(
                    f"For {kind} input, hx and cx should also be {expected}-D but got "
                    f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if hx is None:
            hx = self._zero_states(input, input.size(batch_dim))
        self.check_forward_args(input, hx, None)
        steps_first = input.transpose(0, 1) if self.batch_first else input
        output, (hidden, cell) = self._run(steps_first, None, hx)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            return output.squeeze(batch_dim), (hidden.squeeze(1), cell.squeeze(1))
        return output, (hidden, cell)

    def _zero_states(self, like: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        blocks = self.num_layers * (2 if self.bidirectional else 1)
        outputs = self.proj_size or self.hidden_size
        hidden = torch.zeros(blocks, batch, outputs, dtype=like.dtype, device=like.device)
        cell = torch.zeros(blocks, batch, self.hidden_size, dtype=like.dtype, device=like.device)
        return hidden, cell

    def _run(
        self, input: Tensor, batch_sizes: Tensor | None, hx: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        weights = self._weights()
        packed = None
        if self._frozen is not None and not (self.training and self.weight_dropout > 0):
            packed = self._frozen.packed(weights)
        request = LstmRequest(
            input,
            batch_sizes,
            hx[0],
            hx[1],
            weights,
            has_biases=self.bias,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
        )
        output, hidden, cell = lstm(
            request,
            dropout=self.dropout,
            training=self.training,
            packed=packed,
            backend=self._backend,
        )
        return output, (hidden, cell)

    def _plain_weights(self) -> list[Tensor]:
        return [weight for weight in self._flat_weights if weight is not None]

    def _weights(self) -> list[Tensor]:
        """All weights, the recurrent ones with elements dropped."""
        weights = self._plain_weights()
        if self.training and self.weight_dropout > 0:
            for place, name in enumerate(self._flat_weights_names):
                if name.startswith("weight_hh"):
                    weights[place] = torch.dropout(weights[place], self.weight_dropout, True)
        return weights


def _two(hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Refuses other numbers of states as torch's operator does."""
    if isinstance(hx, tuple | list) and len(hx) > 2:
        raise RuntimeError("lstm expects two hidden states")
    return hx

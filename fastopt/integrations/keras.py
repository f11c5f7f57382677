"""Keras 3 on its torch backend: ``LSTM``, ``Adam`` and ``AdamW`` for ``keras`` models.

They are the classes of Keras with the same arguments, configuration and weights; saved models load
where this module has been imported.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import torch
from keras.src.backend import in_stateless_scope
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastopt import optim
from fastopt.backends.contract import LstmRequest
from fastopt.ops.lstm import lstm

if keras.backend.backend() != "torch":
    raise ImportError(
        "fastopt.integrations.keras needs the torch backend: set KERAS_BACKEND=torch before keras "
        f"is imported, which has {keras.backend.backend()!r}"
    )

registered: Any = keras.saving.register_keras_serializable(package="fastopt")


@registered
class LSTM(keras.layers.LSTM):  # type: ignore[misc]
    """:class:`keras.layers.LSTM` on fastopt's kernels, forward and backward.

    Any mask runs in them, right-padded or not. Other activations than ``tanh`` and ``sigmoid``, and
    ``recurrent_dropout``, are left to Keras. ``use_cudnn`` and ``unroll`` have no effect otherwise.
    """

    def inner_loop(
        self, sequences: Tensor, initial_state: Any, mask: Any, training: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What Keras calls with inputs ``[batch, steps, features]``, states and mask.

        Returns:
            The last output ``[batch, units]``, the outputs ``[batch, steps, units]``, and the final
            states.
        """
        cell = self.cell
        usual = keras.activations.tanh, keras.activations.sigmoid
        if (
            (cell.activation, cell.recurrent_activation) != usual
            or cell.recurrent_dropout
            or sequences.is_meta
        ):
            return super().inner_loop(  # type: ignore[no-any-return]
                sequences, initial_state, mask, training
            )
        if isinstance(mask, list | tuple):
            mask = mask[0]
        if training and cell.dropout:
            sequences = sequences * cell.get_dropout_mask(sequences[:, 0]).unsqueeze(1)
        kernel, recurrent = (
            keras.ops.convert_to_tensor(weight) for weight in (cell.kernel, cell.recurrent_kernel)
        )
        weights = [kernel.t(), recurrent.t()]
        if cell.use_bias:  # torch has a second one
            bias = keras.ops.convert_to_tensor(cell.bias)
            weights += [bias, torch.zeros_like(bias)]
        hidden, state = (
            keras.ops.convert_to_tensor(given).to(kernel.dtype) for given in initial_state
        )
        sequences = sequences.to(kernel.dtype)
        if self.go_backwards:
            sequences = sequences.flip(1)
            mask = None if mask is None else mask.flip(1)
        if mask is None:
            output, hidden, state = _run(sequences.transpose(0, 1), None, hidden, state, weights)
            output = output.transpose(0, 1)
        else:
            output, hidden, state = self._run_masked(sequences, mask, hidden, state, weights)
        return output[:, -1], output, [hidden, state]

    def _run_masked(
        self, sequences: Tensor, mask: Tensor, hidden: Tensor, state: Tensor, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs over the steps that a mask ``[batch, steps]`` shows; at others the output stays."""
        seen = mask.bool()
        lengths = seen.sum(1)
        # The steps that are seen, one behind the other; one step at least.
        order = seen.logical_not().sort(dim=1, stable=True).indices
        packed = pack_padded_sequence(
            sequences.take_along_dim(order.unsqueeze(2), 1), lengths.clamp(min=1).cpu(),
            batch_first=True, enforce_sorted=False,
        )  # fmt: skip
        by_length, back = packed.sorted_indices, packed.unsorted_indices
        output, final_hidden, final_state = _run(
            packed.data, packed.batch_sizes, hidden[by_length], state[by_length], weights
        )
        padded, _ = pad_packed_sequence(
            packed._replace(data=output), batch_first=True, total_length=sequences.size(1)
        )
        place = seen.cumsum(1).unsqueeze(2) - 1  # of the last step seen so far
        output = padded.take_along_dim(place.clamp(min=0), 1).masked_fill(place < 0, 0)
        if self.zero_output_for_mask:
            output = output.masked_fill(~seen.unsqueeze(2), 0)
        any_seen = (lengths > 0).unsqueeze(1)
        hidden = torch.where(any_seen, final_hidden[back], hidden)
        state = torch.where(any_seen, final_state[back], state)
        return output, hidden, state


def _run(
    input: Tensor, batch_sizes: Tensor | None, hidden: Tensor, state: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one direction; states are ``[batch, units]``."""
    request = LstmRequest(
        input, batch_sizes, hidden.unsqueeze(0), state.unsqueeze(0), weights,
        has_biases=len(weights) == 4, num_layers=1, bidirectional=False,
    )  # fmt: skip
    output, hidden, state = lstm(request, dropout=0.0, training=False)
    return output, hidden.squeeze(0), state.squeeze(0)


class _FusedStep:
    """The step of Keras's Adam by :class:`fastopt.optim.Adam`, on the variables of Keras.

    What Keras does around it, clipping, decay, averages, accumulation, stays Keras's.
    """

    _fused: optim.Adam | None = None
    _steps_taken = -1

    def build(self, variables: Any) -> None:
        """As Keras does; the optimizer of ours takes Keras's variables for its state."""
        super().build(variables)  # type: ignore[misc]
        self._fused = None

    def _backend_update_step(self, grads: Any, variables: Any, learning_rate: Any) -> None:
        if in_stateless_scope():
            super()._backend_update_step(  # type: ignore[misc]
                grads, variables, learning_rate
            )
            return
        this: Any = self
        done = int(this.iterations)
        if self._fused is None:
            self._fused = self._make_fused()
        if done != self._steps_taken:  # weights were loaded, or a step was taken elsewhere
            self._count(self._fused.param_groups[0]["params"], done)
        (group,) = self._fused.param_groups
        group["lr"] = keras.ops.convert_to_tensor(learning_rate)
        # Keras adds epsilon to the root of the second moment before its bias is corrected.
        group["eps"] = this.epsilon / math.sqrt(1 - this.beta_2 ** (done + 1))
        kept = [param.grad for param in group["params"]]
        for param in group["params"]:
            param.grad = None
        for variable, grad in zip(variables, grads, strict=True):
            variable.value.grad = grad.to(variable.value.dtype)
        self._fused.step()
        self._count([param for param in group["params"] if param.grad is None], done + 1)
        self._steps_taken = done + 1
        for param, grad in zip(group["params"], kept, strict=True):
            param.grad = grad

    def _make_fused(self) -> optim.Adam:
        this: Any = self
        variables = [
            variable
            for variable in this._trainable_variables
            if not this._overwrite_variable_with_gradient(variable)
        ]
        fused = optim.Adam(
            [variable.value for variable in variables],
            betas=(this.beta_1, this.beta_2), amsgrad=this.amsgrad,
        )  # fmt: skip
        for variable in variables:
            place = this._get_variable_index(variable)
            state = fused.state[variable.value]
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = this._momentums[place].value
            state["exp_avg_sq"] = this._velocities[place].value
            if this.amsgrad:
                state["max_exp_avg_sq"] = this._velocity_hats[place].value
        return fused

    def _count(self, params: list[Tensor], steps: int) -> None:
        assert self._fused is not None
        for param in params:
            self._fused.state[param]["step"].fill_(steps)


@registered
class Adam(_FusedStep, keras.optimizers.Adam):  # type: ignore[misc]
    """:class:`keras.optimizers.Adam` on fastopt's kernels."""


@registered
class AdamW(_FusedStep, keras.optimizers.AdamW):  # type: ignore[misc]
    """:class:`keras.optimizers.AdamW` on fastopt's kernels."""

"""Everyone who takes part in an LSTM's case: ours, and stock in all its forms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastopt
from bench.compute_contenders import assert_same, compute_contender, with_gradients
from bench.lstm_cases import LSTMCase
from bench.timing import OURS, Contender, on_one_thread

# "The best of stock" is sought among these.
STOCK = ("torch default", "torch default, 1 thread", "torch compiled")
PEERS = ()


@dataclass(frozen=True)
class Problem:
    """A module, its input and the gradient of its output, the same for every contender."""

    module: torch.nn.LSTM
    inputs: Tensor | PackedSequence
    cotangent: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        return {"input": data_of(self.inputs), **dict(self.module.named_parameters())}


def data_of(sequence: Tensor | PackedSequence) -> Tensor:
    """The tensor of a sequence, packed or not."""
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def make_problem(case: LSTMCase, cls: Any, dtype: torch.dtype | None = None) -> Problem:
    """Draws in the case's dtype, so that a problem of another ``dtype`` has the same values."""
    generator = torch.Generator(case.device).manual_seed(0)
    dtype = dtype or case.dtype

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=case.device) * scale
        return drawn.to(case.dtype).to(dtype)

    module = cls(
        case.input_size,
        case.hidden_size,
        case.layers,
        bidirectional=case.directions == 2,
        proj_size=case.proj_size,
        dtype=dtype,
        device=case.device,
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw(*parameter.shape, scale=case.hidden_size**-0.5))
    module.flatten_parameters()  # else cuDNN copies them at every call
    padded = draw(case.time, case.batch, case.input_size)
    inputs: Tensor | PackedSequence = padded
    if case.lengths:
        inputs = pack_padded_sequence(padded, torch.tensor(case.lengths), enforce_sorted=False)
    if case.mode == "training":
        data_of(inputs).requires_grad_()
    tokens = data_of(inputs).shape[:-1]
    cotangent = draw(*tokens, case.directions * case.output_size)
    return Problem(module.train(case.mode == "training"), inputs, cotangent)


def lstm_contenders(case: LSTMCase) -> dict[str, Contender]:
    """A call for everyone."""
    contenders = {
        OURS: _contender(case, make_problem(case, fastopt.nn.LSTM)),
        "torch default": _contender(case, make_problem(case, torch.nn.LSTM)),
    }
    if case.batch == 1 and case.threads > 1:
        contenders["torch default, 1 thread"] = on_one_thread(
            _contender(case, make_problem(case, torch.nn.LSTM)), case.threads
        )
    if case.compiled:
        from torch._dynamo import config

        config.allow_rnn = True
        problem = make_problem(case, torch.nn.LSTM)
        contenders["torch compiled"] = _contender(case, problem, torch.compile(problem.module))
    return contenders


def _contender(case: LSTMCase, problem: Problem, compiled: Any = None) -> Contender:
    module = problem.module if compiled is None else compiled

    def call() -> Tensor:
        output, _ = module(problem.inputs)
        return data_of(output)

    return compute_contender(case, problem.leaves, call, problem.cotangent)


# Of a few steps against double precision, relative and absolute; stock's bf16 is within 1.5e-2.
PARITY = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
TF32_PARITY = 5e-3


def clipped(case: LSTMCase) -> LSTMCase:
    """The case with fewer and smaller sequences and a smaller module."""
    return dataclasses.replace(
        case,
        time=min(case.time, 9),
        batch=min(case.batch, 5),
        input_size=min(case.input_size, 40),
        hidden_size=min(case.hidden_size, 56),
        proj_size=min(case.proj_size, 24),
        lengths=tuple(1 + length % 9 for length in case.lengths[:5]),
        compiled=False,
    )


def check_parity(case: LSTMCase) -> None:
    """Refuses to time a call that gives other numbers than stock in double precision.

    Raises:
        AssertionError: An output, a state or, in training, a gradient differs.
    """
    small = clipped(case)
    actual = _everything(small, make_problem(small, fastopt.nn.LSTM))
    expected = _everything(small, make_problem(small, torch.nn.LSTM, torch.float64))
    assert_same(case, actual, expected, TF32_PARITY if case.tf32 else PARITY[case.dtype])


def _everything(case: LSTMCase, problem: Problem) -> dict[str, Any]:
    with torch.set_grad_enabled(case.mode == "training"):
        output, (hidden, cell) = problem.module(problem.inputs)
    results = {"output": data_of(output), "h_n": hidden, "c_n": cell}
    return with_gradients(case, problem.leaves, results, problem.cotangent)

"""The parity cases that the LSTM's kernels have to pass on a card before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastopt.backends.cuda_context import tf32_products
from fastopt.backends.selfcheck import Outcome, register
from fastopt.nn.lstm import LSTM

BOTH = {"bidirectional": True}
# Of the largest value of a tensor. Stock in double precision is the truth.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 6e-2, torch.float16: 8e-3}
TF32_TOLERANCE = 8e-3


class Case(NamedTuple):
    """One module over one batch; every size odd, or more than a block's share."""

    name: str
    dtype: torch.dtype
    hidden: int
    batch: int = 5
    options: dict[str, Any] = {}  # noqa: RUF012  # never written
    lengths: tuple[int, ...] | None = None
    tf32: bool = False


CASES = (
    Case("fp32", torch.float32, 37, 9),
    Case("fp32, both directions", torch.float32, 20, 70, {**BOTH, "num_layers": 2}),
    Case("fp32, packed", torch.float32, 19, 5, BOTH, (4, 1, 3, 4, 2)),
    Case("fp32, projected", torch.float32, 19, 5, {**BOTH, "proj_size": 6}),
    Case("tf32", torch.float32, 37, 9, BOTH, tf32=True),
    Case("fp64", torch.float64, 13, 3, BOTH),
    Case("bf16", torch.bfloat16, 264, 33),
    Case("bf16, packed", torch.bfloat16, 40, 5, BOTH, (4, 1, 3, 4, 2)),
    Case("fp16", torch.float16, 40, 9, BOTH),
)
STEPS, INPUTS = 4, 7


def check_lstm(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Runs small modules forward and backward with the kernels, and with stock in fp64."""
    for case in CASES:
        with tf32_products(case.tf32):
            outcome = Outcome(case.name, _compare(case, device, backend))
        yield outcome


def _compare(case: Case, device: torch.device, backend: str) -> str:
    with torch.random.fork_rng(devices=[]):  # the user's numbers stay as they are
        stock = torch.nn.LSTM(INPUTS, case.hidden, **case.options, dtype=torch.float64)
        ours = LSTM(INPUTS, case.hidden, **case.options, dtype=case.dtype, backend=backend)
    for number, (mine, twin) in enumerate(zip(ours.parameters(), stock.parameters(), strict=True)):
        with torch.no_grad():
            mine.copy_(_values(tuple(mine.shape), number) / case.hidden**0.5)
            twin.copy_(mine)
    ours.to(device)
    rows = case.options.get("num_layers", 1) * (2 if stock.bidirectional else 1)
    sizes = (STEPS, case.batch, INPUTS), (rows, case.batch, stock.proj_size or case.hidden)
    shapes = (*sizes, (rows, case.batch, case.hidden))
    rounded = [_values(shape, 90 + n).to(case.dtype) for n, shape in enumerate(shapes)]
    actual = _run(ours, [value.to(device) for value in rounded], case.lengths)
    expected = _run(stock, [value.double() for value in rounded], case.lengths)
    tolerance = TF32_TOLERANCE if case.tf32 else TOLERANCES[case.dtype]
    for name, value in expected.items():
        bound = tolerance * float(value.abs().max())
        error = float((actual[name].cpu().double() - value).abs().max())
        if not error <= bound:
            return f"{name} is off by {error:.2e}, more than {bound:.2e}"
    return ""


def _run(
    lstm: torch.nn.LSTM, given: list[Tensor], lengths: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """Outputs and gradients of a loss that reads all outputs."""
    data, h_0, c_0 = leaves = [tensor.detach().requires_grad_() for tensor in given]
    run_over: Tensor | PackedSequence = data
    if lengths is not None:
        run_over = pack_padded_sequence(data, torch.tensor(lengths), enforce_sorted=False)
    output, (h_n, c_n) = lstm(run_over, (h_0, c_0))
    if isinstance(output, PackedSequence):
        output = output.data
    outputs = {"output": output, "h_n": h_n, "c_n": c_n}
    weights = [_values(tuple(v.shape), 70 + n) for n, v in enumerate(outputs.values())]
    torch.autograd.backward(
        list(outputs.values()), [w.to(v) for w, v in zip(weights, outputs.values(), strict=True)]
    )
    names = ["input", "h_0", "c_0", *dict(lstm.named_parameters())]
    results = {name: value.detach() for name, value in outputs.items()}
    for name, leaf in zip(names, [*leaves, *lstm.parameters()], strict=True):
        assert leaf.grad is not None
        results[f"the gradient of {name}"] = leaf.grad
    return results


def _values(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


register("lstm", check_lstm)

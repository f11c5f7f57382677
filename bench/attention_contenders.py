"""Everyone who takes part in an attention's case: ours, and stock in all its forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock

import fastopt
from bench.attention_cases import AttentionCase
from bench.cases import assert_same
from bench.timing import OURS, Contender

# "The best of stock" is sought among these.
STOCK = ("torch default",)


@dataclass(frozen=True)
class Problem:
    """Inputs of a call and the gradient of its output, the same for every contender."""

    inputs: tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    cotangent: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        named = dict(zip(("query", "key", "value"), self.inputs, strict=True))
        return named if self.bias is None else {**named, "bias": self.bias}


def make_problem(case: AttentionCase, dtype: torch.dtype | None = None) -> Problem:
    """Draws in the case's dtype, so that a problem of another ``dtype`` has the same values."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).to(dtype or case.dtype)

    shapes = [
        (case.batch, case.heads, rows, case.features)
        for rows in (case.rows, case.length, case.length)
    ]
    query, key, value = (draw(*shape) for shape in shapes)
    bias = draw(case.heads, case.rows, case.length) if case.extra == "bias" else None
    problem = Problem((query, key, value), bias, draw(*shapes[0]))
    for leaf in problem.leaves.values():
        leaf.requires_grad_(case.mode == "training")
    return problem


def attention_contenders(case: AttentionCase) -> dict[str, Contender]:
    """A call for everyone."""
    ours = fastopt.nn.functional.scaled_dot_product_attention
    return {
        OURS: _contender(case, make_problem(case), ours),
        "torch default": _contender(case, make_problem(case), stock),
    }


def _output(case: AttentionCase, problem: Problem, function: Callable[..., Tensor]) -> Tensor:
    dropout = 0.1 if case.extra == "dropout" else 0.0
    return function(*problem.inputs, problem.bias, dropout, case.causal)


def _contender(case: AttentionCase, problem: Problem, function: Callable[..., Tensor]) -> Contender:
    def infer() -> None:
        with torch.no_grad():
            _output(case, problem, function)

    def train() -> None:
        torch.autograd.backward(_output(case, problem, function), problem.cotangent)

    def prepare() -> None:
        for leaf in problem.leaves.values():
            leaf.grad = None

    return Contender(infer) if case.mode == "inference" else Contender(train, prepare)


# Against stock in double precision, relative and absolute; bf16 has 8 bits.
PARITY = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def clipped(case: AttentionCase) -> AttentionCase:
    """The case with fewer heads, queries and keys."""
    return dataclasses.replace(
        case, batch=min(case.batch, 2), heads=2, length=70, features=min(case.features, 32)
    )


def check_parity(case: AttentionCase) -> None:
    """Refuses to time a call that gives other numbers than stock in double precision.

    Dropout's draws are nobody else's: a case with dropout is compared without it.

    Raises:
        AssertionError: An output or, in training, a gradient differs.
    """
    small = clipped(case)
    if case.extra == "dropout":
        small = dataclasses.replace(small, extra="")
    ours = fastopt.nn.functional.scaled_dot_product_attention
    actual = _everything(small, make_problem(small), ours)
    expected = _everything(small, make_problem(small, torch.float64), stock)
    assert_same(case, actual, expected, PARITY[case.dtype])


def _everything(
    case: AttentionCase, problem: Problem, function: Callable[..., Tensor]
) -> dict[str, Any]:
    output = _output(case, problem, function)
    results: dict[str, Any] = {"output": output}
    if case.mode == "training":
        torch.autograd.backward(output, problem.cotangent)
        results |= {f"gradient of {name}": leaf.grad for name, leaf in problem.leaves.items()}
    return results

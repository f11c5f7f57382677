"""Everyone who takes part in a linear cross-entropy's case: ours, and torch's with all options."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastopt
from bench.compute_contenders import assert_same, compute_contender, with_gradients
from bench.linear_cross_entropy_cases import CHUNKED, LIGER, PLAIN, LinearCrossEntropyCase
from bench.timing import OURS, Contender

# "The best of stock" is sought among these.
STOCK = (PLAIN, CHUNKED)
PEERS = ("torch compiled",)


@dataclass(frozen=True)
class Problem:
    """Tensors of a call, the same for every contender."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        return {"input": self.input, "linear_weight": self.linear_weight}


def make_problem(case: LinearCrossEntropyCase, dtype: torch.dtype | None = None) -> Problem:
    """Draws in the case's dtype, so that a problem of another ``dtype`` has the same values."""
    generator = torch.Generator(case.device).manual_seed(0)

    def draw(scale: float, *shape: int) -> Tensor:
        drawn = scale * torch.randn(shape, generator=generator, device=case.device)
        return drawn.to(case.dtype).to(dtype or case.dtype)

    input = draw(1.0, case.rows, case.features)
    weight = draw(case.features**-0.5, case.classes, case.features)
    target = torch.randint(case.classes, (case.rows,), generator=generator, device=case.device)
    target[: round(case.rows * case.ignored)] = -100
    problem = Problem(input, weight, target)
    for leaf in problem.leaves.values():
        leaf.requires_grad_(case.mode == "training")
    return problem


def composed(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """What torch's function is without options, for each torch."""
    logits = torch.nn.functional.linear(input, linear_weight)
    return torch.nn.functional.cross_entropy(logits, target, **options)


def named(case: Any) -> dict[str, Callable[..., Tensor]]:
    """The functions by their names; torch in chunks where it knows how to."""
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: fastopt.nn.functional.linear_cross_entropy,
        PLAIN: composed,
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy") and not case.label_smoothing:
        functions[CHUNKED] = _chunked
    return functions


def _liger(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(**options)(linear_weight, input, target)
    return loss


def linear_cross_entropy_contenders(case: LinearCrossEntropyCase) -> dict[str, Contender]:
    """A call for everyone."""
    functions = named(case)
    if case.device == "cuda" and importlib.util.find_spec("liger_kernel"):
        functions[LIGER] = _liger
    if case.compiled:
        functions["torch compiled"] = torch.compile(composed, dynamic=False)
    return {
        name: _contender(case, make_problem(case), function) for name, function in functions.items()
    }


def _chunked(*tensors: Tensor, label_smoothing: float) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(*tensors, options=options)


def _loss(
    case: LinearCrossEntropyCase, problem: Problem, function: Callable[..., Tensor]
) -> Tensor:
    return function(
        problem.input, problem.linear_weight, problem.target, label_smoothing=case.label_smoothing
    )


def _contender(
    case: LinearCrossEntropyCase, problem: Problem, function: Callable[..., Tensor]
) -> Contender:
    return compute_contender(case, problem.leaves, partial(_loss, case, problem, function))


# Against torch in double precision, relative and absolute; bf16 has 8 bits.
PARITY = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def clipped(case: LinearCrossEntropyCase) -> LinearCrossEntropyCase:
    """The case with fewer rows, features and classes."""
    return dataclasses.replace(
        case, rows=min(case.rows, 60), features=min(case.features, 32),
        classes=min(case.classes, 1001), compiled=False,
    )  # fmt: skip


def check_parity(case: LinearCrossEntropyCase) -> None:
    """Refuses to time a call that gives other numbers than torch in double precision.

    Raises:
        AssertionError: The loss or, in training, a gradient differs.
    """
    small = clipped(case)
    actual = _everything(small, make_problem(small), fastopt.nn.functional.linear_cross_entropy)
    expected = _everything(small, make_problem(small, torch.float64), composed)
    assert_same(case, actual, expected, PARITY[case.dtype])


def _everything(
    case: LinearCrossEntropyCase, problem: Problem, function: Callable[..., Tensor]
) -> dict[str, Any]:
    return with_gradients(case, problem.leaves, {"loss": _loss(case, problem, function)})

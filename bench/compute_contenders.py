"""What contenders that multiply matrices have in common: how they are called and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.cases import ComputeCase
from bench.timing import Contender


def compute_contender(
    case: ComputeCase,
    leaves: Mapping[str, Tensor],
    call: Callable[[], Tensor],
    cotangent: Tensor | None = None,
) -> Contender:
    """Without gradients, or with a backward pass that adds to none, as after ``zero_grad``."""

    def infer() -> None:
        with torch.no_grad():
            call()

    def train() -> None:
        torch.autograd.backward(call(), cotangent)

    def prepare() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    return Contender(infer) if case.mode == "inference" else Contender(train, prepare)


def with_gradients(
    case: ComputeCase,
    leaves: Mapping[str, Tensor],
    results: Mapping[str, Tensor],
    cotangent: Tensor | None = None,
) -> dict[str, Any]:
    """What a call returned and, in training, every gradient of the first of it."""
    if case.mode == "inference":
        return {**results}
    torch.autograd.backward(next(iter(results.values())), cotangent)
    return {**results, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def assert_same(
    case: ComputeCase,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
) -> None:
    """Compares results by name, whatever their dtypes; ``tolerance`` is relative and absolute.

    Raises:
        AssertionError: One differs; it names the case and the result.
    """
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            check_dtype=False,
            msg=lambda text, name=name: f"{case.name}: {name}: {text}",  # type: ignore[misc]
        )

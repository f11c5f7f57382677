"""Calls of the linear cross-entropy, and how tests run and compare them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cards import placed
from fastopt.nn.functional import linear_cross_entropy
from tolerances import assert_matches, assert_no_worse_than_stock

WIDE = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)
EXTRAS = ("softcap", "z_loss")


class Case(NamedTuple):
    """Sizes and options; ``target`` says what the rows are to be."""

    sizes: tuple[int, int, int]  # rows, features, classes
    options: dict[str, Any] = {}  # noqa: RUF012 (of a tuple)
    target: str = "some ignored"
    bias: bool = False
    weight: bool = False


USUAL = (37, 20, 101)
CASES = {
    "plain": Case(USUAL, target="classes"),
    "ignored": Case(USUAL),
    "all but one ignored": Case(USUAL, target="all but one ignored"),
    "one of everything": Case((1, 1, 1), target="classes"),
    "two classes": Case((3, 2, 2)),
    "no rows": Case((0, 5, 7), {"reduction": "sum"}, target="classes"),
    "no row has a part": Case((6, 5, 7), {"reduction": "sum"}, target="all ignored"),
    "several chunks": Case((1100, 6, 33), {"reduction": "sum"}, bias=True),
    "many classes": Case((5, 8, 9001), bias=True),
    "ignored class": Case(USUAL, {"ignore_index": 3}, bias=True),
    "probabilities": Case(USUAL, target="probabilities"),
    "everything": Case(USUAL, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.02}, bias=True,
                       weight=True),
    "everything, probabilities": Case(
        USUAL, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.02}, "probabilities", True, True
    ),
    "softcap": Case(USUAL, {"softcap": 1.5}),
    "z_loss": Case(USUAL, {"z_loss": 0.1}, weight=True),
    "negative z_loss": Case(USUAL, {"z_loss": -0.01, "reduction": "none"}),
    "all smoothed": Case(USUAL, {"label_smoothing": 1.0}),
    **{
        f"{reduction}, {'weight, ' if weight else ''}smoothing {smoothing}, {target}": Case(
            USUAL, {"reduction": reduction, "label_smoothing": smoothing}, target, weight=weight
        )
        for reduction, weight, smoothing, target in itertools.product(
            ("none", "mean", "sum"), (False, True), (0.0, 0.2), ("some ignored", "probabilities")
        )
    },
}  # fmt: skip


def problem(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors by the names of the arguments, with values that the dtype has, and a gradient."""
    rows, features, classes = case.sizes

    def values(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    target = torch.randint(classes, (rows,))
    ignored = case.options.get("ignore_index", -100)
    if case.target == "some ignored":
        target[::3] = ignored
    elif case.target == "all but one ignored":
        target[1:] = ignored
    elif case.target == "all ignored":
        target[:] = ignored
    elif case.target == "probabilities":
        target = torch.randn(rows, classes).softmax(1).to(dtype)
    scalar = case.options.get("reduction", "mean") != "none"
    return {
        "input": values(rows, features),
        "linear_weight": values(classes, features) / 2,
        "target": target,
        "linear_bias": values(classes) if case.bias else None,
        "weight": torch.rand(classes).to(dtype) if case.weight else None,
        "gradient": values() if scalar else values(rows),
    }


LEAVES = ("input", "linear_weight", "linear_bias")


def results(
    function: Callable[..., Tensor], given: dict[str, Any], dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Loss and gradients of a call in a dtype, by name, on the CPU."""
    tensors = {
        name: tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in given.items()
    }
    leaves = {name: tensors[name].requires_grad_() for name in LEAVES if tensors[name] is not None}
    gradient = tensors.pop("gradient")
    arguments = [tensors.pop(name) for name in ("input", "linear_weight", "target")]
    loss = function(*arguments, **tensors, **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()), gradient.to(loss.dtype))
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: result.detach().cpu() for name, result in {"loss": loss, **named}.items()}


def run(case: Case, dtype: torch.dtype, backend: str, given: dict[str, Any]) -> dict[str, Tensor]:
    """By a backend; the reference computes in double precision throughout."""
    wide = torch.float64 if backend == "reference" else dtype
    copies = {name: None if t is None else t.detach().clone() for name, t in given.items()}
    return results(
        linear_cross_entropy, placed(copies, backend), wide, backend=backend, **case.options
    )


def table_of(result: str) -> str:
    """The row of the tolerances for a result."""
    kind = " gradients" if result.startswith("gradient") else ""
    return f"linear_cross_entropy{kind}"


def assert_agrees(
    case: Case, dtype: torch.dtype, actual: dict[str, Tensor], given: dict[str, Any]
) -> None:
    """Compares with the reference; low precision is as near as torch's operations are."""
    expected = run(case, dtype, "reference", given)
    stock = run(case, dtype, "torch", given) if dtype in NARROW else {}
    for name, value in expected.items():
        assert actual[name].dtype is dtype
        if dtype in WIDE:
            assert_matches(actual[name], value.to(dtype), op=table_of(name), dtype=dtype)
        elif actual[name].numel():
            assert_no_worse_than_stock(actual[name], stock[name], value)

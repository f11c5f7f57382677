"""The parity cases that the cross-entropy's kernels have to pass on a card before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import registry
from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.cuda_context import tf32_products
from fastopt.backends.reference import reference_linear_cross_entropy
from fastopt.backends.selfcheck import Outcome, register

# Of the largest value: logits and their gradients are rounded to 7 or 10 bits of mantissa.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}

# Rows, features, classes.
Sizes = tuple[int, int, int]
ODD, LARGE = (13, 24, 301), (7, 16, 5003)
EVERYTHING = {
    "weight": True, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.01, "bias": True,
    "ignored": True,
}  # fmt: skip
CASES: tuple[tuple[str, torch.dtype, Sizes, dict[str, Any]], ...] = tuple(
    (f"{str(dtype).removeprefix('torch.')}, {name}", dtype, sizes, options)
    for dtype in TOLERANCES
    for name, sizes, options in (
        ("classes", LARGE, {"ignored": True}),
        ("smoothed", ODD, {"label_smoothing": 0.2, "chunk_rows": 5}),
        ("everything", ODD, EVERYTHING),
        ("probabilities", ODD, {"probabilities": True, "weight": True}),
    )
)


def check_linear_cross_entropy(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Forward and backward against the reference in double precision."""
    with tf32_products(False):
        for name, dtype, sizes, options in CASES:
            yield Outcome(name, _compare(dtype, sizes, dict(options), device, backend))


def _request(
    dtype: torch.dtype, sizes: Sizes, options: dict[str, Any]
) -> LinearCrossEntropyRequest:
    """On the CPU, with numbers that the dtype has."""
    rows, features, classes = sizes
    generator = torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(classes, (rows,), generator=generator)
    if options.pop("ignored", False):
        target[::3] = -100
    if options.pop("probabilities", False):
        target = values(rows, classes).double().softmax(1).to(dtype)
    bias = values(classes) if options.pop("bias", False) else None
    weight = values(classes).abs() if options.pop("weight", False) else None
    input, linear_weight = values(rows, features), values(classes, features) / 2
    return LinearCrossEntropyRequest(input, linear_weight, target, bias, weight, **options)


def _moved(
    request: LinearCrossEntropyRequest, device: torch.device, dtype: torch.dtype
) -> LinearCrossEntropyRequest:
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(request):
        tensor = getattr(request, field.name)
        if isinstance(tensor, Tensor):
            changed[field.name] = tensor.detach().to(
                device, dtype if tensor.is_floating_point() else tensor.dtype
            )
    return dataclasses.replace(request, **changed)


def _compare(
    dtype: torch.dtype, sizes: Sizes, options: dict[str, Any], device: torch.device, backend: str
) -> str:
    request = _request(dtype, sizes, options)
    exact = _moved(request, torch.device("cpu"), torch.float64)
    leaves = {
        name: getattr(exact, name).requires_grad_()
        for name in ("input", "linear_weight", "linear_bias")
        if getattr(exact, name) is not None
    }
    loss = reference_linear_cross_entropy(exact)
    truth = [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]
    mine = _moved(request, device, dtype)
    kernels = registry.kernels(registry.choose(mine, backend).name)
    wanted = True, True, "linear_bias" in leaves
    found = kernels.linear_cross_entropy_forward(mine, wanted)
    again = kernels.linear_cross_entropy_backward(mine, torch.ones_like(found[0]), wanted)
    names = ["loss", *(f"gradient of {name}" for name in leaves)]
    names += [f"gradient of {name}, backward" for name in leaves]
    results = [*found[: len(leaves) + 1], *again[: len(leaves)]]
    tolerance = TOLERANCES[dtype]
    for name, actual, expected in zip(names, results, truth + truth[1:], strict=True):
        try:
            torch.testing.assert_close(
                actual.detach().cpu().double(), expected, rtol=tolerance,
                atol=tolerance * float(expected.abs().max()),
            )  # fmt: skip
        except AssertionError as error:
            return f"{name}: {' '.join(str(error).split())}"
    return ""


register("linear_cross_entropy", check_linear_cross_entropy)

"""The one table of tolerances, and the ways to compare that read it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# (relative, absolute). Several optimizer steps: a few units in the last place.
TOLERANCES: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    ("optimizer", torch.float32): (1e-5, 1e-6),
    ("optimizer", torch.float64): (1e-12, 1e-13),
    # Stock rounds after each of its operations, we round once: over five steps of values around 2
    # that is a few units of 2^-7, respectively 2^-10, and more where a second moment of stock's is
    # a subnormal half. The tests against fp64 are the sharp ones.
    ("optimizer", torch.bfloat16): (3e-2, 4e-2),
    ("optimizer", torch.float16): (1e-2, 2e-2),
    # Four steps of 0.02 to 0.1, times 3 at most for shapes, along directions that stock computes in
    # bf16: elements of up to 1 that are 3% off after five products of products.
    ("muon", torch.float32): (1e-4, 2e-2),
    ("muon", torch.float64): (1e-4, 2e-2),
    ("muon", torch.bfloat16): (3e-2, 4e-2),
    ("muon", torch.float16): (1e-2, 2e-2),
    # Of a square random matrix, whose small singular values each step multiplies by 3.4, and with
    # them the rounding of all the others.
    ("newton_schulz", torch.float32): (1e-4, 1e-4),
    ("newton_schulz", torch.float64): (1e-12, 1e-12),
    # A norm and gradients scaled by it: stock sums in fp32 and rounds norm and coefficient to the
    # gradients' dtype.
    ("grad_norm", torch.float32): (1e-5, 1e-6),
    ("grad_norm", torch.float64): (1e-12, 1e-13),
    ("grad_norm", torch.bfloat16): (3e-2, 1e-3),
    ("grad_norm", torch.float16): (4e-3, 1e-4),
    # The same where stock's norm of fp32 parameters contains norms rounded to bf16.
    ("mixed", torch.float32): (1e-2, 1e-3),
    ("mixed", torch.bfloat16): (3e-2, 4e-2),
    # Stock's own error against fp64 needs 2e-7 beside the relative part in outputs, and 4e-6 in
    # gradients, which are sums over steps and sequences that cancel in part.
    ("lstm", torch.float32): (2e-5, 2e-6),
    ("lstm", torch.float64): (1e-11, 1e-12),
    ("lstm gradients", torch.float32): (2e-5, 1e-5),
    ("lstm gradients", torch.float64): (1e-11, 1e-12),
    ("attention", torch.float32): (2e-5, 5e-6),
    ("attention", torch.float64): (1e-11, 1e-12),
    # These are sums over queries or keys that cancel in part.
    ("attention gradients", torch.float32): (2e-5, 1e-5),
    ("attention gradients", torch.float64): (1e-11, 1e-12),
    # Stock's own error against fp64 is up to 1e-6 of losses around 5, and of gradients' largest
    # values, which are sums over rows or classes that cancel in part.
    ("linear_cross_entropy", torch.float32): (2e-5, 5e-6),
    ("linear_cross_entropy", torch.float64): (1e-11, 1e-12),
    ("linear_cross_entropy gradients", torch.float32): (2e-5, 1e-5),
    ("linear_cross_entropy gradients", torch.float64): (1e-11, 1e-12),
    # Sums of a few values of size 1 to 4, where half precision rounds once, when storing.
    ("rounded once", torch.float32): (1e-6, 1e-6),
    ("rounded once", torch.float64): (1e-13, 1e-14),
    ("rounded once", torch.bfloat16): (8e-3, 1e-6),
    ("rounded once", torch.float16): (1e-3, 1e-6),
    # Where a chance lies next to the border, rounding goes one code further: an eighth for a byte
    # with a sign. Clipped bf16 gradients are rounded before they are used, by 1e-4 of 0.05 or so.
    ("state in 8bit", torch.float32): (0.14, 5e-5),
    ("state in bf16", torch.float32): (2e-2, 5e-5),
    ("state in fp32", torch.float32): (5e-3, 5e-5),
    ("parameter by chance", torch.float32): (8e-3, 3e-4),
    # Means of many numbers that were rounded by chance.
    ("mean of chances", torch.float32): (1e-2, 1e-6),
    # Losses of a language model after training, with state in fewer bytes and in fp32.
    ("small state", torch.float32): (1e-2, 0.0),
    # Losses over an epoch or two, where processes sum their halves of a gradient.
    ("losses of processes", torch.float32): (1e-3, 1e-5),
    # Three steps of size 1e-2 and below, from moments with errors of 3% to 6%.
    ("changed storage", torch.float32): (1e-5, 1e-2),
    ("changed storage, bf16", torch.bfloat16): (2e-2, 2e-2),
}
# (relative, absolute as a part of the largest value), in units of the dtype's last place. Two
# factors that were rounded to it go into every product of a low-precision attention.
ROUNDED_OPERANDS_ULPS = (4.0, 3.0)

# Tensor cores read ten bits behind the point of an fp32 number.
TF32_EPS = 2.0**-10

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# "Low precision passes when its error against fp64 is at most twice stock's."
ERROR_RATIO = 2.0
# An error may be this many units in the last place where stock happens to hit the exact value.
SLACK_ULPS = 1.0

# Of exp, sigmoid and tanh against the exact values; core/activations.h promises it.
ACTIVATION_ULPS = 4.0


def assert_matches(actual: Tensor, expected: Tensor, *, op: str, dtype: torch.dtype) -> None:
    """Compares values, NaN and infinities included, shapes and dtypes."""
    rtol, atol = TOLERANCES[op, REAL.get(dtype, dtype)]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_same_formula(actual: Tensor, expected: Tensor, *, op: str, dtype: torch.dtype) -> None:
    """Compares the bits that two kernels of one formula give.

    Without full optimization, as `make sanitize` builds, the compiler fuses products and sums in
    one of them and not in the other: there they have to agree to rounding.
    """
    if os.environ.get("FASTOPT_SANITIZE") == "1":
        assert_matches(actual, expected, op=op, dtype=dtype)
    else:
        assert torch.equal(actual, expected)


def assert_no_worse_than_stock(actual: Tensor, stock: Tensor, truth: Tensor) -> None:
    """Holds the error against double precision to twice stock's."""
    ours = (actual.double() - truth).abs()
    theirs = (stock.double() - truth).abs()
    ulp = truth.abs().clamp_min(torch.finfo(actual.dtype).tiny) * torch.finfo(actual.dtype).eps
    limit = ERROR_RATIO * theirs.max() + SLACK_ULPS * ulp
    assert torch.isfinite(actual).all()
    assert (ours <= limit).all(), f"error {ours.max()} against stock's {theirs.max()}"


def assert_as_near_as_stock(actual: Tensor, stock: Tensor, truth: Tensor) -> None:
    """Holds the root mean square of many errors to twice stock's: the largest one is luck."""
    ours, theirs = ((t.double() - truth).square().mean().sqrt() for t in (actual, stock))
    assert ours <= ERROR_RATIO * theirs, f"error {ours} against stock's {theirs}"


def assert_rounds_like_operands(
    actual: Tensor, expected: Tensor, size: Tensor, eps: float | None = None
) -> None:
    """Holds a result of rounded factors to a few units in the last place of terms of a size.

    ``eps`` is that of the factors where it is not the result's.
    """
    eps = torch.finfo(actual.dtype).eps if eps is None else eps
    relative, absolute = ROUNDED_OPERANDS_ULPS
    torch.testing.assert_close(
        actual.double(), expected, rtol=relative * eps, atol=absolute * eps * float(size.detach())
    )


def assert_as_near_as_tf32(actual: Tensor, truth: Tensor) -> None:
    """Holds the error against double precision to what tf32 products explain, and no less."""
    error = (actual.double() - truth).abs().max() / truth.abs().max()
    assert TF32_EPS / 1000 < error < TF32_EPS, f"error {error} against {TF32_EPS}"

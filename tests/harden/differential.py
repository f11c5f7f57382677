"""What differential tests share: options in pairs, odd values, and who is right where they differ.

Stock is the oracle. Where a result is not stock's within the tolerances, stock in double precision
decides: an element passes that has its value, or is at most twice as far from it as stock's own.
So NaN and infinities are where stock has them, or, where an intermediate result of stock's
overflowed or cancelled, where they are in exact arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from allpairspy import AllPairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tolerances import ERROR_RATIO, REAL, ROUNDED_OPERANDS_ULPS, TOLERANCES

# Cases of a family: 20,000 by `make harden`.
CASES = int(os.environ.get("FASTOPT_HARDEN_CASES", "1000"))

ODD = (
    float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-40, 1e-30, 1e30, -1e30, 3e38,
    -65504.0, 6e-8,
)  # fmt: skip
# The same without what scores of -inf and NaN are made of: torch's paths treat them in two ways.
ODD_FACTORS = (0.0, -0.0, 1e-42, -1e-40, 1e-30, -4.0, 6e-8)
# How many elements of a hundred are odd.
portions = st.sampled_from([0, 0, 3, 50])


def pairs(**options: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of options that have each pair of values of each two options."""
    rows = AllPairs([list(values) for values in options.values()])
    return [dict(zip(options, row, strict=True)) for row in rows]


def with_odd(
    values: Tensor, portion: int, generator: torch.Generator, odd: Sequence[float] = ODD
) -> Tensor:
    """Odd values in some places, in the layout that the tensor has."""
    if portion == 0 or values.numel() == 0:
        return values
    chosen = torch.rand(values.shape, generator=generator) * 100 < portion
    places = torch.randint(len(odd), values.shape, generator=generator)
    drawn = torch.tensor(odd, dtype=torch.float64)[places].to(values.dtype)
    made = torch.empty_like(values)
    made.copy_(torch.where(chosen, drawn, values))
    return made


def assert_agrees(
    actual: Tensor, stock: Tensor, truth: Tensor, op: str, terms: Tensor | None = None
) -> None:
    """Compares element by element, NaN and infinities included.

    Errors may be as large as roundings of the ``terms``, whose magnitudes' sum is given. Where an
    operation rounds its factors and none are given, the largest value takes their place.
    """
    dtype = actual.dtype
    assert dtype is stock.dtype and actual.shape == stock.shape
    wide = torch.complex128 if dtype.is_complex else torch.float64
    ours, theirs, exact = (t.detach().to(dtype).to(wide) for t in (actual, stock, truth))
    real = REAL.get(dtype, dtype)
    atol: float | Tensor
    if (op, real) in TOLERANCES:
        rtol, atol = TOLERANCES[op, real]
        if terms is not None:  # that sum to less, or to nothing: half a unit of each
            atol = (torch.finfo(real).eps / 2 * terms.nan_to_num()).clamp_min(atol)
    else:
        rtol, atol = (ulps * torch.finfo(real).eps for ulps in ROUNDED_OPERANDS_ULPS)
        finite = exact[exact.isfinite()].abs()
        largest = finite.max() if finite.numel() else torch.zeros(())
        atol = atol * (largest if terms is None else terms.nan_to_num())
        atol = atol + torch.finfo(real).tiny  # products of bf16 have no subnormal factors
    passed = near(ours, theirs, rtol, atol) | near(ours, exact, rtol, atol)
    passed |= near(ours, exact, rtol, atol + ERROR_RATIO * (theirs - exact).abs())
    if not passed.all():
        where = ~passed
        raise AssertionError(
            f"{int(where.sum())} of {where.numel()} elements: ours {ours[where][:4].tolist()}, "
            f"stock {theirs[where][:4].tolist()}, exact {exact[where][:4].tolist()}"
        )


def unit_off(values: Tensor, generator: torch.Generator) -> Tensor:
    """Each value moved by up to one unit in its last place."""
    real = torch.finfo(values.dtype)
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return values.double() * (1 + real.eps * noise)


def near(ours: Tensor, other: Tensor, rtol: float, atol: float | Tensor) -> Tensor:
    """Where numbers are within the tolerances, and NaN and infinities are the same."""
    same = (ours == other) | (ours.isnan() & other.isnan())
    return same | (other.isfinite() & ((ours - other).abs() <= atol + rtol * other.abs()))


def assert_finite_alike(actual: Tensor, stock: Tensor, truth: Tensor) -> None:
    """Compares where there are numbers: what a gate of nearly 1 leaves, times 1e30, is none."""
    finite = actual.isfinite()
    exact = truth.to(actual.dtype).isfinite()
    assert ((finite == stock.isfinite()) | (finite == exact)).all()


class Draws:
    """What a case is drawn from: hypothesis for its form, a seeded generator for its numbers."""

    def __init__(self, draw: Callable[[Any], Any], seed: int) -> None:
        self._draw, self.seed = draw, seed
        self.drawn: list[Any] = []
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, strategy: Any) -> Any:
        """A value."""
        self.drawn.append(self._draw(strategy))
        return self.drawn[-1]


Check = Callable[[Draws, dict[str, Any]], None]


@dataclass(frozen=True)
class Kept:
    """A case that failed once: its options, the seed of its numbers, and what was drawn."""

    options: dict[str, Any]
    seed: int
    drawn: tuple[Any, ...]

    def run(self, check: Check) -> None:
        """Checks it again."""
        left = iter(self.drawn)
        check(Draws(lambda _: next(left), self.seed), self.options)


def run_cases(rows: list[dict[str, Any]], cases: int, check: Check) -> int:
    """Checks each row of options with its share of the cases, and says how many ran."""
    share = max(1, -(-cases // len(rows)))
    return sum(run_row(row, share, check) for row in rows)


def run_row(row: dict[str, Any], cases: int, check: Check) -> int:
    """Checks so many cases of one row, the same ones every time."""
    ran = 0
    last: Draws | None = None

    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data(), seed=st.integers(0, 2**31))
    def checked(data: Any, seed: int) -> None:
        nonlocal ran, last
        ran += 1
        last = Draws(data.draw, seed)
        check(last, row)

    try:
        checked()
    except Exception as error:
        if last is not None:
            error.add_note(f"to keep: {Kept(row, last.seed, tuple(last.drawn))}")
        raise
    return ran


def each_pair(rows: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """The pairs that rows have, for a test of ``pairs``."""
    for row in rows:
        items = [(name, repr(value)) for name, value in row.items()]
        for place, left in enumerate(items):
            for right in items[place + 1 :]:
                yield left, right

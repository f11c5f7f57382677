"""What every case has, whatever its operator: a name, bars, rounds, threads."""

from __future__ import annotations

import abc
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch

Mode = Literal["training", "inference"]

BEST_OF_STOCK = "best of stock"


@dataclass(frozen=True)
class Bar:
    """What a case has to reach: our time against a contender's, or the best of stock's."""

    contender: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        group: The table that the row belongs to.
        name: The row's name, unique.
        bars: What is to be reached.
        limit_bar: Fraction of the machine's limit (bandwidth, arithmetic) to be reached, or 0.
        rounds: How many times each contender is timed.
        threads: For every contender that does not say otherwise in its name.
        compiled: Whether Inductor takes part: for some cases it compiles for minutes.
    """

    group: ClassVar[str]

    name: str
    _: KW_ONLY
    bars: tuple[Bar, ...] = ()
    limit_bar: float = 0.0
    rounds: int = 20
    threads: int = 2
    compiled: bool = False


@dataclass(frozen=True)
class ComputeCase(Case, abc.ABC):
    """A row whose limit is arithmetic.

    Attributes:
        mode: Forward and backward, or forward without gradients in ``eval()``.
        dtype: Of inputs and parameters.
        device: Of inputs and parameters.
        tf32: Whether factors of fp32 products may be rounded to tf32.
    """

    _: KW_ONLY
    mode: Mode = "training"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tf32: bool = False

    @property
    @abc.abstractmethod
    def forward_flops(self) -> int:
        """Useful work of a forward pass."""

    @property
    def flops(self) -> int:
        """Useful work of a call: a backward pass multiplies twice what a forward multiplies."""
        return self.forward_flops * (3 if self.mode == "training" else 1)

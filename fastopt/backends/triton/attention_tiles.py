"""What a program of each attention kernel owns, by card, arithmetic and number of features."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch

from fastopt.backends.triton import launch

# Features that rows of a table are made for: as many, or fewer.
HEAD_DIMS = (64, 128, 256)

# Rows of a program that multiplies nothing.
MERGED_ROWS = 16
DELTA_ROWS = 32


class Tile(NamedTuple):
    """Queries by keys; the warps of a program, and how many tiles are on their way."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kernel(enum.Enum):
    """Those that have tiles of scores."""

    FORWARD = enum.auto()
    DECODE = enum.auto()  # the forward kernel, for few queries
    KEY_GRADIENT = enum.auto()
    QUERY_GRADIENT = enum.auto()
    BIAS_GRADIENT = enum.auto()


class Scores(enum.Enum):
    """Scaled products between bounds, or anything else, which needs registers of its own."""

    PLAIN = enum.auto()
    GENERAL = enum.auto()


# A tile for each of HEAD_DIMS.
Row = tuple[tuple[int, int, int, int], tuple[int, int, int, int], tuple[int, int, int, int]]
Table = dict[tuple[Kernel, Scores], Row]

# What the compiler says of registers and shared memory decided, not a clock: at most 64 bytes
# spilled, tests/test_triton_builds.py holds it. Cards of 2020 to 2022 have 99 KB at the least.
_HALF: dict[int, Table] = {
    80: {
        (Kernel.FORWARD, Scores.PLAIN): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        (Kernel.FORWARD, Scores.GENERAL): ((128, 64, 4, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        (Kernel.DECODE, Scores.PLAIN): ((16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2)),
        (Kernel.KEY_GRADIENT, Scores.PLAIN): ((64, 128, 8, 3), (64, 64, 8, 2), (32, 32, 8, 1)),
        (Kernel.KEY_GRADIENT, Scores.GENERAL): ((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        (Kernel.QUERY_GRADIENT, Scores.PLAIN): ((128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
        (Kernel.BIAS_GRADIENT, Scores.GENERAL): ((64, 32, 8, 2), (64, 32, 8, 1), (32, 16, 4, 2)),
    },
    90: {
        (Kernel.FORWARD, Scores.PLAIN): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        (Kernel.FORWARD, Scores.GENERAL): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        (Kernel.DECODE, Scores.PLAIN): ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
        (Kernel.KEY_GRADIENT, Scores.PLAIN): ((64, 128, 8, 3), (32, 128, 8, 3), (32, 32, 8, 1)),
        (Kernel.KEY_GRADIENT, Scores.GENERAL): ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        (Kernel.QUERY_GRADIENT, Scores.PLAIN): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        (Kernel.QUERY_GRADIENT, Scores.GENERAL): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 16, 8, 2)),
        (Kernel.BIAS_GRADIENT, Scores.GENERAL): ((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
    },
    100: {
        (Kernel.FORWARD, Scores.PLAIN): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        (Kernel.FORWARD, Scores.GENERAL): ((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
        (Kernel.DECODE, Scores.PLAIN): ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
        (Kernel.KEY_GRADIENT, Scores.PLAIN): ((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        (Kernel.KEY_GRADIENT, Scores.GENERAL): ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        (Kernel.QUERY_GRADIENT, Scores.PLAIN): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        (Kernel.QUERY_GRADIENT, Scores.GENERAL): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        (Kernel.BIAS_GRADIENT, Scores.GENERAL): ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    },
}
# Tensor cores of these want a factor transposed, which is loaded by way of registers: no pipeline.
_TF32: dict[int, Table] = {
    80: {
        (Kernel.FORWARD, Scores.PLAIN): ((64, 32, 4, 2), (64, 32, 8, 1), (32, 16, 4, 1)),
        (Kernel.DECODE, Scores.PLAIN): ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
        (Kernel.KEY_GRADIENT, Scores.PLAIN): ((64, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        (Kernel.QUERY_GRADIENT, Scores.PLAIN): ((64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
        (Kernel.BIAS_GRADIENT, Scores.GENERAL): ((64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 4, 2)),
    },
    90: {
        (Kernel.FORWARD, Scores.PLAIN): ((64, 64, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1)),
        (Kernel.DECODE, Scores.PLAIN): ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
        (Kernel.KEY_GRADIENT, Scores.PLAIN): ((64, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        (Kernel.QUERY_GRADIENT, Scores.PLAIN): ((64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
        (Kernel.BIAS_GRADIENT, Scores.GENERAL): ((64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 4, 2)),
    },
}
_FP32: dict[int, Table] = {
    80: {
        (Kernel.FORWARD, Scores.PLAIN): ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        (Kernel.DECODE, Scores.PLAIN): ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        (Kernel.KEY_GRADIENT, Scores.PLAIN): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        (Kernel.QUERY_GRADIENT, Scores.PLAIN): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        (Kernel.BIAS_GRADIENT, Scores.GENERAL): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}

# A program costs the interpreter milliseconds, whatever its tiles.
_INTERPRETED = Tile(128, 128, 4, 1)
_INTERPRETED_DECODE = Tile(16, 128, 4, 1)


def tile(
    kernel: Kernel, capability: int, dtype: torch.dtype, tf32: bool, features: int, scores: Scores
) -> Tile:
    """That of a kernel for the larger number of features of keys and values."""
    if launch.interpreted():
        return _INTERPRETED_DECODE if kernel is Kernel.DECODE else _INTERPRETED
    tables = _HALF if dtype is not torch.float32 else _TF32 if tf32 else _FP32
    table = tables[max(card for card in tables if card <= _generation(capability))]
    row = table.get((kernel, scores)) or table[kernel, Scores.PLAIN]
    return Tile(*row[next(i for i, most in enumerate(HEAD_DIMS) if features <= most)])


def _generation(capability: int) -> int:
    """Only the first of a generation has its shared memory and its tensor cores."""
    return capability if capability in (90, 100, 103) else 80

"""The LSTM's rows, as data: a shape, a bar for training and one for inference."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bench.cases import BEST_OF_STOCK, Bar, ComputeCase, Mode


@dataclass(frozen=True)
class LSTMCase(ComputeCase):
    """A call of ``nn.LSTM`` without dropout, time first, from zero states.

    Attributes:
        time: Steps of every sequence; of the longest, where they differ.
        batch: Sequences.
        input_size: Of the module.
        hidden_size: Of the module.
        layers: Stacked.
        directions: 2: bidirectional.
        proj_size: Of the module; 0: no projection.
        lengths: Of the sequences of a packed batch; none: all of ``time``.
    """

    group: ClassVar[str] = "LSTM"

    time: int
    batch: int
    input_size: int
    hidden_size: int
    layers: int = 1
    directions: int = 1
    proj_size: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def output_size(self) -> int:
        """Of one direction."""
        return self.proj_size or self.hidden_size

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of the matrix products, tokens that are there only."""
        tokens = sum(self.lengths) if self.lengths else self.time * self.batch
        projection = self.hidden_size * self.proj_size
        total = 0
        for layer in range(self.layers):
            width = self.directions * self.output_size if layer else self.input_size
            gates = 4 * self.hidden_size * (width + self.output_size)
            total += 2 * tokens * self.directions * (gates + projection)
        return total


def _both(
    name: str,
    shape: tuple[int, int, int, int],
    bars: tuple[float, float],
    compiled: tuple[Mode, ...] = (),
    **more: Any,
) -> tuple[LSTMCase, LSTMCase]:
    """A row for each mode; ``bars`` are of training and of inference."""

    def case(mode: Mode, ratio: float) -> LSTMCase:
        return LSTMCase(
            f"{name}, {mode}",
            *shape,
            mode=mode,
            bars=(Bar(BEST_OF_STOCK, ratio),),
            compiled=mode in compiled,
            **more,
        )

    return case("training", bars[0]), case("inference", bars[1])


# Inductor takes part where it hands fp32 inference to oneDNN; else it unrolls the steps in time and
# compiles for minutes.
_COMPILED: tuple[Mode, ...] = ("inference",)

_random = random.Random(0)
PACKED_LENGTHS = (400, 20, *(_random.randint(20, 400) for _ in range(14)))

LSTM_CASES = (
    *_both("LSTM T100 B1 I128 H256", (100, 1, 128, 256), (2.5, 2.0), _COMPILED, rounds=60),
    *_both("LSTM T128 B32 I128 H256", (128, 32, 128, 256), (1.5, 1.2), _COMPILED),
    *_both("LSTM T128 B32 I256 H512", (128, 32, 256, 512), (1.3, 1.1), rounds=10),
    *_both("LSTM T64 B64 I512 H1024", (64, 64, 512, 1024), (1.2, 1.1), rounds=5),
    *_both(
        "LSTM T64 B32 I128 H256, 2 layers, 2 directions",
        (64, 32, 128, 256),
        (1.5, 1.2),
        layers=2,
        directions=2,
        rounds=10,
    ),
    *_both(
        "LSTM T20-400 B16 I128 H256, packed",
        (400, 16, 128, 256),
        (2.5, 2.0),
        lengths=PACKED_LENGTHS,
        rounds=10,
    ),
    *_both("LSTM T64 B32 I256 H512 P128", (64, 32, 256, 512), (1.8, 1.5), proj_size=128),
    *_both("LSTM T64 B32 I128 H256, bf16", (64, 32, 128, 256), (2.0, 1.5), dtype=torch.bfloat16),
    *_both("LSTM T64 B32 I128 H256, fp64", (64, 32, 128, 256), (1.3, 1.2), dtype=torch.float64),
)


def _on_card(batch: int, hidden: int, ratio: float) -> tuple[LSTMCase, ...]:
    """``ratio`` is of training; bf16, tf32 and fp32."""
    kinds: dict[str, dict[str, Any]] = {
        "bf16": {"dtype": torch.bfloat16},
        "tf32": {"tf32": True},
        "fp32": {},
    }
    return tuple(
        LSTMCase(
            f"LSTM T128 B{batch} I{hidden} H{hidden}, {kind}, training",
            *(128, batch, hidden, hidden),
            device="cuda",
            bars=(Bar("torch default", ratio if kind != "fp32" else 1.0),),
            **options,
        )
        for kind, options in kinds.items()
    )


GPU_LSTM_CASES = tuple(
    case
    for hidden in (256, 512, 1024)
    for batch, ratio in ((16, 1.5), (64, 1.5), (256, 1.0))
    for case in _on_card(batch, hidden, ratio)
)

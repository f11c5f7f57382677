"""The linear cross-entropy's rows, as data: sizes, options and bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bench.cases import Bar, ComputeCase

PLAIN, CHUNKED, LIGER = "torch default", "torch chunked", "Liger-Kernel"


@dataclass(frozen=True)
class LinearCrossEntropyCase(ComputeCase):
    """A call of ``linear_cross_entropy``.

    Attributes:
        rows: Of the input: tokens.
        features: Of each row.
        classes: The vocabulary.
        label_smoothing: As the function has it.
        ignored: The part of the rows that have no part in the loss.
    """

    group: ClassVar[str] = "Linear cross-entropy"

    rows: int
    features: int
    classes: int
    label_smoothing: float = 0.0
    ignored: float = 0.0

    @property
    def forward_flops(self) -> int:
        """Of the logits that count."""
        return 2 * round(self.rows * (1 - self.ignored)) * self.features * self.classes


def _case(
    name: str, sizes: tuple[int, int, int], bars: dict[str, float], **more: Any
) -> LinearCrossEntropyCase:
    """A row; ``bars`` are ratios by contender."""
    return LinearCrossEntropyCase(
        f"linear cross-entropy {name}", *sizes,
        bars=tuple(Bar(contender, ratio) for contender, ratio in bars.items()), **more,
    )  # fmt: skip


_GPT2 = (2048, 768, 50_257)

LINEAR_CROSS_ENTROPY_CASES = (
    _case("2048x768x50257, training", _GPT2, {PLAIN: 1.15, CHUNKED: 2.8}, rounds=5),
    _case("2048x768x50257, inference", _GPT2, {PLAIN: 1.15}, mode="inference", rounds=8),
    _case("2048x768x50257, smoothed, training", _GPT2, {PLAIN: 1.15}, label_smoothing=0.1,
          rounds=5),
    _case("2048x768x50257, half ignored, training", _GPT2, {PLAIN: 2.0}, ignored=0.5, rounds=5),
    _case("2048x768x50257, bf16, training", _GPT2, {CHUNKED: 1.0}, dtype=torch.bfloat16, rounds=5),
    _case("512x512x32000, training", (512, 512, 32_000), {PLAIN: 1.1, CHUNKED: 2.0}),
    _case("1024x128x1024, training", (1024, 128, 1024), {PLAIN: 1.0}),
)  # fmt: skip

_bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
GPU_LINEAR_CROSS_ENTROPY_CASES = (
    _case("8192x4096x128256, bf16, training", (8192, 4096, 128_256),
          {CHUNKED: 1.0, LIGER: 1.0}, **_bf16),
    _case("8192x768x50257, bf16, training", (8192, 768, 50_257),
          {PLAIN: 1.0, CHUNKED: 1.0, LIGER: 1.0}, **_bf16),
    _case("4096x768x50257, fp32, training", (4096, 768, 50_257), {PLAIN: 1.0}, device="cuda"),
)  # fmt: skip

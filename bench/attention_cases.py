"""Attention's rows, as data: a shape, a bar for the forward pass and one with the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bench.cases import BEST_OF_STOCK, Bar, ComputeCase, Mode


@dataclass(frozen=True)
class AttentionCase(ComputeCase):
    """A call of ``scaled_dot_product_attention``.

    Attributes:
        batch: Of all three inputs.
        heads: Of all three inputs.
        length: Keys, and queries unless ``queries`` says otherwise.
        features: Of all three inputs.
        causal: Whether the mask is causal.
        queries: How many; 0: as many as keys.
        extra: A learned bias of every head, a mask of them all, or dropout of a tenth of the
            weights.
    """

    group: ClassVar[str] = "Attention"

    batch: int
    heads: int
    length: int
    features: int
    causal: bool = False
    queries: int = 0
    extra: Literal["", "bias", "mask", "dropout"] = ""

    @property
    def rows(self) -> int:
        """Queries of a head."""
        return self.queries or self.length

    @property
    def forward_flops(self) -> int:
        """Of the two products; with a causal mask, of the half that counts."""
        table = self.batch * self.heads * self.rows * self.length
        return 4 * table * self.features // (2 if self.causal else 1)

    @property
    def flops(self) -> int:
        """A backward pass has five products, one of them a second time."""
        return self.forward_flops * 7 // 2 if self.mode == "training" else self.forward_flops


def _both(
    name: str, shape: tuple[int, int, int, int], bars: tuple[float, float], **more: Any
) -> tuple[AttentionCase, AttentionCase]:
    """A row for each mode; ``bars`` are of the forward pass and of both."""

    def case(mode: Mode, ratio: float) -> AttentionCase:
        return AttentionCase(
            f"{name}, {mode}", *shape, mode=mode, bars=(Bar(BEST_OF_STOCK, ratio),),
            compiled=True, **more,
        )  # fmt: skip

    return case("inference", bars[0]), case("training", bars[1])


def _long_dropout(length: int) -> AttentionCase:
    """Stock makes a table of the scores here: what is of interest is the memory."""
    return AttentionCase(
        f"SDPA 1x2x{length}x64, dropout, training", 1, 2, length, 64, extra="dropout", rounds=3
    )


_short: dict[str, Any] = {"rounds": 40}
_long: dict[str, Any] = {"rounds": 12}

ATTENTION_CASES = (
    *_both("SDPA causal 4x8x256x64", (4, 8, 256, 64), (1.8, 1.9), causal=True, **_short),
    *_both("SDPA 4x8x512x64", (4, 8, 512, 64), (1.2, 1.35)),
    *_both("SDPA causal 1x12x1024x64", (1, 12, 1024, 64), (1.75, 1.9), causal=True),
    *_both("SDPA causal 1x12x2048x64", (1, 12, 2048, 64), (1.75, 1.9), causal=True, **_long),
    *_both("SDPA causal 2x8x1024x128", (2, 8, 1024, 128), (1.5, 1.7), causal=True, **_long),
    *_both("SDPA 1x12x1024x64, dropout", (1, 12, 1024, 64), (6, 4), extra="dropout", **_long),
    *_both("SDPA 2x8x1024x64, learned bias", (2, 8, 1024, 64), (3, 3), extra="bias", **_long),
    *_both("SDPA 2x8x1024x64, bf16", (2, 8, 1024, 64), (1.2, 5), dtype=torch.bfloat16, **_long),
    *_both("SDPA 2x8x1024x64, fp16", (2, 8, 1024, 64), (1.2, 5), dtype=torch.float16, **_long),
    AttentionCase(
        "SDPA one query over 8x12x4096x64",
        *(8, 12, 4096, 64),
        mode="inference",
        queries=1,
        bars=(Bar(BEST_OF_STOCK, 1.3),),
        compiled=True,
    ),
    *(_long_dropout(length) for length in (2048, 4096, 8192)),
)


def _on_card(
    name: str, shape: tuple[int, int, int, int], bars: dict[str, float], **more: Any
) -> tuple[AttentionCase, AttentionCase]:
    def case(mode: Mode) -> AttentionCase:
        return AttentionCase(
            f"SDPA {name}, {mode}", *shape, mode=mode, device="cuda", compiled=True,
            bars=tuple(Bar(contender, ratio) for contender, ratio in bars.items()), **more,
        )  # fmt: skip

    return case("inference"), case("training")


_bf16: dict[str, Any] = {"dtype": torch.bfloat16}
GPU_ATTENTION_CASES = (
    *_on_card("causal 4x16x2048x128, bf16", (4, 16, 2048, 128), {"FLASH": 0.9}, causal=True,
              **_bf16),
    *_on_card("4x16x2048x64, bf16", (4, 16, 2048, 64), {"FLASH": 0.9}, **_bf16),
    *_on_card("causal 8x12x1024x64, bf16", (8, 12, 1024, 64), {"FLASH": 0.9}, causal=True, **_bf16),
    *_on_card("2x8x2048x256, bf16", (2, 8, 2048, 256), {"FLASH": 0.9}, **_bf16),
    *_on_card("4x16x2048x64, bf16, dropout", (4, 16, 2048, 64), {"FLASH": 0.9}, extra="dropout",
              **_bf16),
    *_on_card("4x16x1024x64, bf16, mask", (4, 16, 1024, 64), {"EFFICIENT": 1.0}, extra="mask",
              **_bf16),
    *_on_card("4x16x1024x64, bf16, learned bias", (4, 16, 1024, 64), {"FlexAttention": 2.0},
              extra="bias", **_bf16),
    *_on_card("causal 2x8x1024x64, fp32", (2, 8, 1024, 64), {"EFFICIENT": 1.0}, causal=True),
    *_on_card("causal 2x8x1024x64, tf32", (2, 8, 1024, 64), {"EFFICIENT": 1.0}, causal=True,
              tf32=True),
)  # fmt: skip

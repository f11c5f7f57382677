"""What ``triton_builds.py`` has the attention launch: each kernel in each row of its table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastopt.backends.contract import AttentionRequest
from fastopt.backends.cuda_context import tf32_products
from fastopt.backends.triton import launch
from fastopt.backends.triton.attention_tiles import HEAD_DIMS
from fastopt.backends.triton.backend import TritonBackend

PLAIN: dict[str, Any] = {"right": 0, "bottom_right": True}
GENERAL = PLAIN | {"softcap": 2.0, "dropout": 0.1, "seed": torch.tensor(3)}


def attend(
    backend: TritonBackend, features: int, dtype: torch.dtype, *, queries: int = 256,
    heads: int = 4, key_heads: int = 4, tf32: bool = False, cards: tuple[int, ...] = (),
    **options: Any,
) -> None:  # fmt: skip
    """Forward and, of many queries, backward; a bias goes with general scores.

    Of one key head, few queries split the keys.
    """
    if cards and launch.capability(torch.device("cpu")) not in cards:
        return

    def values(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, features, dtype=dtype)

    if "softcap" in options:
        options["bias"] = torch.zeros(1, heads, queries, 1024, dtype=dtype)
    key = values(1, key_heads, 1024)
    request = AttentionRequest(values(1, heads, queries), key, key, scale=0.1, **options)
    with tf32_products(tf32):
        output, logsumexp = backend.attention_forward(request)
        if queries > 16:
            gradient = torch.zeros_like(output)
            backend.attention_backward(
                request, gradient, output, logsumexp, request.bias is not None, False
            )


def sequences(backend: TritonBackend) -> None:
    """Windows, groups and sinks over sequences behind each other, of which some keys are used."""
    query, key = torch.zeros(1, 8, 512, 96).half(), torch.zeros(1, 2, 512, 96).half()
    starts, used = torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    request = AttentionRequest(
        query, key, key, sinks=torch.zeros(8), slopes=torch.zeros(4, 8), query_starts=starts,
        key_starts=starts, used_keys=used, scale=0.1, left=100, right=0, bottom_right=True,
    )  # fmt: skip
    output, logsumexp = backend.attention_forward(request)
    backend.attention_backward(request, output, output, logsumexp, False, True)


RUNS: dict[str, Callable[[TritonBackend], None]] = {"sequences": sequences}
for _features in HEAD_DIMS:
    for _name, _options in {
        "bf16": {"dtype": torch.bfloat16} | PLAIN,
        "bf16, general": {"dtype": torch.bfloat16} | GENERAL,
        "bf16, decoding": {"dtype": torch.bfloat16, "queries": 2, "key_heads": 1} | PLAIN,
        # These have one row of tiles for all scores.
        "tf32": {"dtype": torch.float32, "tf32": True} | GENERAL,
        "tf32, decoding": {"dtype": torch.float32, "queries": 2, "key_heads": 1, "tf32": True}
        | GENERAL,
        # And these one for all cards.
        "fp32": {"dtype": torch.float32, "cards": (80,)} | GENERAL,
        "fp32, decoding": {"dtype": torch.float32, "queries": 2, "key_heads": 1, "cards": (80,)}
        | GENERAL,
    }.items():
        RUNS[f"{_name}, {_features} features"] = functools.partial(
            attend, features=_features, **_options
        )
RUNS["fp16"] = functools.partial(attend, features=64, dtype=torch.float16, **PLAIN)

"""Attention's cases under pytest-benchmark, for ``make bench``: ours beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.attention_cases import ATTENTION_CASES, AttentionCase
from bench.attention_contenders import attention_contenders, check_parity
from bench.timing import OURS


@pytest.mark.parametrize("contender", [OURS, "torch default"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_call(case: AttentionCase, contender: str, benchmark: Any) -> None:
    """Times one contender of one case."""
    torch.set_num_threads(case.threads)
    check_parity(case)
    timed = attention_contenders(case)[contender]
    benchmark.group = case.name
    benchmark.pedantic(
        timed.call, setup=lambda: timed.prepare() and None, rounds=5, warmup_rounds=1
    )

"""The cases under pytest-benchmark, for ``make bench``: ours beside torch's fused step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.optimizer_cases import OPTIMIZER_CASES, OptimizerCase
from bench.optimizer_contenders import check_parity, optimizer_contenders
from bench.timing import OURS

SMALL = [case for case in OPTIMIZER_CASES if case.elements <= 20_000_000]


@pytest.mark.parametrize("contender", [OURS, "torch fused", "torch default"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_step(case: OptimizerCase, contender: str, benchmark: Any) -> None:
    """Times one contender of one case."""
    torch.set_num_threads(case.threads)
    check_parity(case)
    steps = optimizer_contenders(case)
    if contender not in steps:
        pytest.skip(f"no {contender} in this case")
    benchmark.group = case.name
    timed = steps[contender]
    rounds = max(3, case.rounds // 4)
    benchmark.pedantic(
        timed.call, setup=lambda: timed.prepare() and None, rounds=rounds, warmup_rounds=1
    )

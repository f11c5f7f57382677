"""Cases that multiply matrices under pytest-benchmark, for ``make bench``: ours beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import ComputeCase
from bench.operators import ATTENTION, LINEAR_CROSS_ENTROPY, LSTM, Operator
from bench.timing import OURS

SMALL = {
    case.name: (operator, case)
    for operator in (LSTM, ATTENTION, LINEAR_CROSS_ENTROPY)
    for case in operator.cases
    if isinstance(case, ComputeCase) and case.flops <= 30e9
}


@pytest.mark.parametrize("contender", [OURS, "torch default"])
@pytest.mark.parametrize(("operator", "case"), SMALL.values(), ids=SMALL)
def test_call(operator: Operator, case: Any, contender: str, benchmark: Any) -> None:
    """Times one contender of one case."""
    torch.set_num_threads(case.threads)
    operator.check_parity(case)
    timed = operator.contenders(case)[contender]
    benchmark.group = case.name
    rounds = max(3, case.rounds // 4)
    benchmark.pedantic(
        timed.call, setup=lambda: timed.prepare() and None, rounds=rounds, warmup_rounds=1
    )

"""The LSTM's cases under pytest-benchmark, for ``make bench``: ours beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.lstm_cases import LSTM_CASES, LSTMCase
from bench.lstm_contenders import check_parity, lstm_contenders
from bench.timing import OURS

SMALL = [case for case in LSTM_CASES if case.flops <= 30e9]


@pytest.mark.parametrize("contender", [OURS, "torch default"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_call(case: LSTMCase, contender: str, benchmark: Any) -> None:
    """Times one contender of one case."""
    torch.set_num_threads(case.threads)
    check_parity(case)
    timed = lstm_contenders(case)[contender]
    benchmark.group = case.name
    rounds = max(3, case.rounds // 4)
    benchmark.pedantic(
        timed.call, setup=lambda: timed.prepare() and None, rounds=rounds, warmup_rounds=1
    )

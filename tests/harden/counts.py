"""A plugin of pytest that counts what passed, for the table of docs/reliability.md."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

_counts: Counter[str] = Counter()


@pytest.fixture
def tally() -> Callable[[str, int], None]:
    """Adds to the cases of a family that passed."""

    def add(family: str, cases: int) -> None:
        _counts[family] += cases

    return add


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _counts["tests"] += 1


def pytest_sessionfinish() -> None:
    path = os.environ.get("FASTOPT_HARDEN_COUNTS")
    if path:
        Path(path).write_text(json.dumps(_counts))

"""A plugin of pytest that counts cases and tests, for the table of docs/reliability.md."""

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


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = os.environ.get("FASTOPT_HARDEN_COUNTS")
    if path:
        counts = {**_counts, "tests": session.testscollected, "failed": session.testsfailed}
        Path(path).write_text(json.dumps(counts))

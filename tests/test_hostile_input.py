"""Hostile arguments end in an exception that names them, or in stock's own, and change nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hostile_cases import ALL, Case, Outcome, read_outcome


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Of all cases, from another process, which survives children that do not."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    program = [sys.executable, str(root / "tests" / "hostile_cases.py")]
    result = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    found = map(read_outcome, result.stdout.splitlines())
    return {outcome.case: outcome for outcome in found}


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_it_is_refused_by_name_and_nothing_has_changed(
    case: Case, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[case.name]
    ours, stock = outcome.ours, outcome.stock
    assert outcome.died == ""
    if ours.raised == "":
        assert stock.raised == "", "accepted, and torch does not"
        return
    word = case.target.words.get(case.argument, case.argument)
    assert re.search(word, ours.text, re.IGNORECASE) or ours.raised == stock.raised, ours
    assert stock.changed or not ours.changed


def test_enough_cases_are_refused(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) == len(ALL)
    assert sum(bool(outcome.ours.raised) for outcome in outcomes.values()) >= 300

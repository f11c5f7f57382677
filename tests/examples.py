"""Runs the programs in ``examples`` as a user does, and makes their modules importable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for _module in ("django", "polib", "tokenizers", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(_module)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
sys.path.insert(0, str(FOLDER))


def run_example(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # One thread: the run is too small to gain from two, and a busy machine stalls teams.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(FOLDER / program), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=120,
        check=False,
    )


def assert_reports(result: subprocess.CompletedProcess[str], contenders: list[str]) -> None:
    """A run that ended well, with every contender in its tables and no check failed."""
    assert result.returncode == 0, result.stderr
    for contender in contenders:
        rows = [line for line in result.stdout.splitlines() if f"│ {contender} " in line]
        assert len(rows) >= 2  # of times and of quality; all but the first are checked as well
    assert "PASS" in result.stdout and "FAIL" not in result.stdout

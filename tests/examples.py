"""Runs the programs in ``examples`` as a user does, and makes their modules importable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

for _module in ("django", "polib", "tokenizers", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(_module)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
sys.path.insert(0, str(FOLDER))


LIMIT = 300  # seconds


def start_example(
    program: str, *arguments: object, launcher: Sequence[str] = ()
) -> subprocess.Popen[str]:
    # One thread: the run is too small to gain from two, and a busy machine stalls teams.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *launcher, str(FOLDER / program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    with process:
        try:
            output = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def run_example(
    program: str, *arguments: object, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return finish(start_example(program, *arguments, launcher=launcher))


def await_file(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def losses_in(checkpoint: Path) -> dict[str, list[float]]:
    """The loss of each step of each contender."""
    saved = torch.load(checkpoint, weights_only=True)
    return {name: state["record"]["losses"] for name, state in saved["contenders"].items()}


def assert_goes_on_after_a_kill(program: str, whole: Path, *arguments: object) -> None:
    """Killed when its first epoch is saved, it has the losses of the run that went through."""
    checkpoint = whole.with_name("killed.pt")
    arguments = (*arguments, "--plot", whole.with_name("killed.png"), "--checkpoint", checkpoint)
    killed = start_example(program, *arguments)
    await_file(checkpoint, killed)
    killed.kill()
    assert finish(killed).returncode == -signal.SIGKILL
    expected = losses_in(whole)
    assert all(0 < len(ls) < len(expected[name]) for name, ls in losses_in(checkpoint).items())
    resumed = run_example(program, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses_in(checkpoint) == expected


def assert_reports(result: subprocess.CompletedProcess[str], contenders: list[str]) -> None:
    """A run that ended well, with every contender in its tables and no check failed."""
    assert result.returncode == 0, result.stderr
    for contender in contenders:
        rows = [line for line in result.stdout.splitlines() if f"│ {contender} " in line]
        assert len(rows) >= 2  # of times and of quality; all but the first are checked as well
    assert "PASS" in result.stdout and "FAIL" not in result.stdout

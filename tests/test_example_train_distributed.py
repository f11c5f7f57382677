"""The distributed example: one process and two, a death in between, and what it refuses."""

import os
import signal
from pathlib import Path

import pytest
import torch

from examples import (
    assert_reports,
    await_file,
    finish,
    losses_in,
    run_example,
    start_example,
)
from tolerances import assert_matches

import _contest  # isort: skip
import _corpus  # isort: skip
import classify_text  # isort: skip
import train_distributed  # isort: skip

PROGRAM = "train_distributed.py"


def torchrun(processes, restarts=0):
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return ["-m", "torch.distributed.run", *options]


def arguments(folder, name):
    paths = folder / f"{name}.png", folder / f"{name}.pt"
    return "--smoke", "--plot", paths[0], "--checkpoint", paths[1]


def workers(launcher):
    """The processes that run the program for torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if PROGRAM.encode() in command]


def test_two_processes_have_the_losses_of_one_and_go_on_after_a_death(tmp_path):
    result = run_example(PROGRAM, *arguments(tmp_path, "two"), launcher=torchrun(2))
    assert_reports(result, ["stock", "stock, fused", "fastopt"])
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    expected = losses_in(tmp_path / "two.pt")

    killed = start_example(PROGRAM, *arguments(tmp_path, "killed"), launcher=torchrun(2, 1))
    await_file(tmp_path / "killed.pt", killed)
    victim = workers(killed.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    result = finish(killed)
    assert result.returncode == 0, result.stderr
    assert f"pid: {victim}" in result.stderr
    assert losses_in(tmp_path / "killed.pt") == expected

    assert run_example(PROGRAM, *arguments(tmp_path, "one")).returncode == 0
    for name, losses in losses_in(tmp_path / "one.pt").items():
        one, two = (torch.tensor(values) for values in (losses, expected[name]))
        assert_matches(two, one, op="losses of processes", dtype=torch.float32)


def test_batches_that_cannot_be_cut_are_refused():
    three = _contest.OneProcess()
    three.count = 3
    with pytest.raises(_corpus.DataError, match="64 texts cannot be cut for 3 processes"):
        train_distributed.contest_of(None, classify_text.SMOKE, three)

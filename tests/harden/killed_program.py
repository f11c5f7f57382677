"""Runs an example that is killed on the way: ``killed_program.py PLACE COUNT ARGUMENTS``.

PLACE is ``step``, and the program dies after so many steps, or ``save``, and it dies when half of
the checkpoint of that number is written.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import _contest  # noqa: E402
import classify_text  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    place, number, *arguments = sys.argv[1:]
    calls, last = count(1), int(number)
    save, train_on = torch.save, _contest.Trainee.train_on

    def half_saved(what: Any, path: Path) -> None:
        save(what, path)
        if next(calls) == last:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def last_trained(trainee: _contest.Trainee, batch: _contest.Batch) -> None:
        train_on(trainee, batch)
        if next(calls) == last:
            die()

    if place == "save":
        torch.save = half_saved
    else:
        _contest.Trainee.train_on = last_trained
    return classify_text.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

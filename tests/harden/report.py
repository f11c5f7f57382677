"""Runs what hardens fastopt and writes docs/reliability.md, from what was counted and nothing else.

``python tests/harden/report.py`` runs all parts, or those named, and keeps their figures in
docs/reliability.json, of which it renders the page. A part that fails writes no row, and the others
run all the same. ``--quick`` runs a small form of each but the sanitizers' and keeps nothing. A row
says at which commit, when and with which versions it was made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
RESULTS, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
# What is counted under a name, in words.
FAMILIES = {
    "optimizers": "Optimizers beside stock",
    "LSTM": "LSTM beside stock",
    "attention": "Attention beside stock",
}
HEAD = """# Reliability

What was run to break fastopt, and how often. `make harden` runs all of it and writes this page from
what was counted; `make harden-quick` runs a small form, without the sanitizers' builds. A part that
fails writes no row.

Cases of a family are random calls beside stock with every pair of options, random shapes and
strides, NaN, infinities, subnormal, huge and tiny numbers among the values;
`tests/harden/differential.py` says when two results agree.

| what | figures | commit | date | versions |
|---|---|---|---|---|
"""


class FailedError(Exception):
    """A part did not pass."""


def provenance() -> dict[str, str]:
    """Where a figure comes from."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    return {
        "commit": commit.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }


def keep(rows: dict[str, str], origin: dict[str, str]) -> None:
    """Adds rows to the results, in the place of older ones of their names, and renders them."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept |= {name: {"figures": figures, **origin} for name, figures in rows.items()}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    lines = [f"| {name} | {' | '.join(row.values())} |" for name, row in kept.items()]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


def counted(*tests: str, cases: int = 0) -> dict[str, int]:
    """Runs tests in a process of their own and says what they counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        environment = os.environ | {
            "FASTOPT_HARDEN_COUNTS": str(path),
            "FASTOPT_HARDEN_CASES": str(cases),
            "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-p", "counts", *tests]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            raise FailedError
        counts: dict[str, int] = json.loads(path.read_text())
        return counts


def last_line(*command: str) -> str:
    """Runs a program whose last line has its figures, behind its name."""
    line = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        for line in program.stdout:
            print(line, end="", flush=True)
    if program.returncode:
        raise FailedError
    return line.strip().split(": ", 1)[-1]


def differential(quick: bool) -> dict[str, str]:
    """Random calls beside stock."""
    counts = counted("tests/harden/test_differential.py", cases=1_000 if quick else 20_000)
    return {words: f"{counts[family]:,} cases, no difference" for family, words in FAMILIES.items()}


def killed(quick: bool) -> dict[str, str]:
    """Demos that are killed, checkpoints that are damaged."""
    fewer = ("-k", "not save-3 and not 0.7 and not 0.99") if quick else ()
    counts = counted("tests/harden/test_killed_runs.py", *fewer)
    return {"Killed runs, damaged and foreign checkpoints": f"{counts['tests']} tests passed"}


def hostile(quick: bool) -> dict[str, str]:
    """Arguments that nobody should pass."""
    counts = counted("tests/test_hostile_input.py")
    return {"Hostile arguments": f"{counts['tests'] - 1:,} calls, no crash, nothing changed"}


def canaries(quick: bool) -> dict[str, str]:
    """Memory around what kernels write."""
    counts = counted("tests/test_canaries.py")
    return {"Canaries around every buffer": f"{counts['tests']} tests passed"}


def faults(quick: bool) -> dict[str, str]:
    """Memory that runs out, threads, forks."""
    counts = counted("tests/test_faults.py", "tests/test_threads_and_processes.py")
    return {"Faults, threads, forks, workers, one core": f"{counts['tests']} tests passed"}


def races(quick: bool) -> dict[str, str]:
    """The CPU kernels under ThreadSanitizer."""
    return {"ThreadSanitizer": last_line(sys.executable, "tests/native/races.py")}


def instructions(quick: bool) -> dict[str, str]:
    """What the CPU kernels take under callgrind."""
    return {"Instruction counts": last_line(sys.executable, "tests/native/instructions.py")}


def leaks(quick: bool) -> dict[str, str]:
    """Memory over many steps."""
    steps = "1000" if quick else "10000"
    return {"Leaks": last_line(sys.executable, "tests/harden/leaks.py", "--steps", steps)}


def huge(quick: bool) -> dict[str, str]:
    """Tensors of more than 2^31 elements."""
    return {"Huge tensors": last_line(sys.executable, "tests/harden/huge.py")}


def sanitizers(quick: bool) -> dict[str, str]:
    """The tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if quick:
        return {}
    figures = last_line("make", "--no-print-directory", "sanitize").strip("= ")
    return {"AddressSanitizer, UndefinedBehaviorSanitizer": figures}


PARTS: dict[str, Callable[[bool], dict[str, str]]] = {
    part.__name__: part
    for part in (
        *(differential, killed, hostile, canaries, faults),
        *(races, instructions, leaks, huge, sanitizers),
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a small form, of which nothing stays")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    failed = []
    for name in options.parts or PARTS:
        start, origin = time.monotonic(), provenance()  # a commit may be made while it runs
        try:
            rows = PARTS[name](options.quick)
        except FailedError:
            failed.append(name)
            continue
        for words, figures in rows.items():
            print(f"{words}: {figures} ({time.monotonic() - start:.0f} s)", flush=True)
        if rows and not options.quick:
            keep(rows, origin)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

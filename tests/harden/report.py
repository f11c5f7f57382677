"""Runs the hardening tests and writes docs/reliability.md, from what was counted and nothing else.

``python tests/harden/report.py run`` runs the tests of this folder, or the parts named, and keeps
their figures in docs/reliability.json; ``FASTOPT_HARDEN_CASES`` is how many differential cases each
family has. A part that fails keeps no row.
``python tests/harden/report.py add NAME FIGURES`` keeps a row of another program: a target of the
Makefile that ends in one line of figures calls it with that line. Either renders the page anew.
A row says at which commit, when and with which versions it was made.
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

What was run to break fastopt, and how often. `make harden-quick` runs all of it in a small form,
`make harden` in full; each writes its figures to `docs/reliability.json`, of which
`python tests/harden/report.py` renders this page. Cases of a family are random calls beside stock
with every pair of options, random shapes and strides, NaN, infinities, subnormal, huge and tiny
numbers among the values; `tests/harden/differential.py` says when two results agree.

| what | figures | commit | date | versions |
|---|---|---|---|---|
"""


def provenance() -> dict[str, str]:
    """Where a figure comes from."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    return {
        "commit": commit.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }


def keep(rows: dict[str, str]) -> None:
    """Adds rows to the results, in the place of older ones of their names, and renders them."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    origin = provenance()
    kept |= {name: {"figures": figures, **origin} for name, figures in rows.items()}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    lines = [f"| {name} | {' | '.join(row.values())} |" for name, row in kept.items()]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


def counted(tests: list[str]) -> tuple[int, dict[str, int]]:
    """Runs tests in a process of their own: its status and its counts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        environment = os.environ | {
            "FASTOPT_HARDEN_COUNTS": str(path),
            "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-p", "counts", *tests]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        return status, json.loads(path.read_text())


def differential() -> tuple[int, dict[str, str]]:
    """Random calls beside stock."""
    status, counts = counted(["tests/harden/test_differential.py"])
    there = {words: counts.get(family, 0) for family, words in FAMILIES.items()}
    return status, {words: f"{cases:,} cases, no difference" for words, cases in there.items()}


def killed() -> tuple[int, dict[str, str]]:
    """Demos that are killed, checkpoints that are damaged."""
    status, counts = counted(["tests/harden/test_killed_runs.py"])
    return status, {"Killed runs and damaged checkpoints": f"{counts['tests']} tests passed"}


def hostile() -> tuple[int, dict[str, str]]:
    """Arguments that nobody should pass."""
    status, counts = counted(["tests/test_hostile_input.py"])
    figures = f"{counts['tests'] - 1:,} calls, no crash, nothing changed"
    return status, {"Hostile arguments": figures}


PARTS = {part.__name__: part for part in (differential, killed, hostile)}


def run(names: list[str]) -> int:
    """The parts named; rows are kept of those that pass."""
    worst = 0
    for name in names:
        status, rows = PARTS[name]()
        if status == 0:
            keep(rows)
        worst = worst or status
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parts = commands.add_parser("run")
    parts.add_argument("parts", nargs="*", metavar="PART", help="all, where none is named")
    row = commands.add_parser("add")
    row.add_argument("name")
    row.add_argument("figures")
    options = parser.parse_args()
    if options.command == "run":
        return run(options.parts or [*PARTS])
    keep({options.name: options.figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())

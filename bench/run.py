"""Runs the cases and writes one JSON file for a machine."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fastopt
from bench.cases import LARGE, OPTIMIZER_CASES, OptimizerCase
from bench.contenders import check_parity, optimizer_contenders
from bench.timing import Contender, interleaved
from fastopt import _native_cpu

ROOT = Path(__file__).parent.parent
BANDWIDTH_PROBE = "add_ of 16.8M"


def run_case(case: OptimizerCase, quick: bool) -> dict[str, Any]:
    """Checks and times one case, with ``add_`` in the same rounds as the measure of bandwidth."""
    torch.set_num_threads(case.threads)
    check_parity(case)
    contenders = optimizer_contenders(case)
    if case.bandwidth_bar:
        left, right = torch.ones(LARGE), torch.ones(LARGE)
        contenders[BANDWIDTH_PROBE] = Contender(lambda: left.add_(right))
    rounds = max(3, case.rounds // 20) if quick else case.rounds
    timings = interleaved(contenders, rounds)
    return {name: dataclasses.asdict(timing) for name, timing in timings.items()}


def run_processes(pattern: str, processes: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Runs every case in several fresh processes, one at a time."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in OPTIMIZER_CASES:
        if pattern not in case.name:
            continue
        for number in range(processes):
            print(f"{case.name}: process {number + 1} of {processes}", file=sys.stderr, flush=True)
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, "-m", "bench", "--case", case.name, "--json", file.name]
                subprocess.run(
                    command + (["--quick"] if quick else []), cwd=ROOT, check=True, timeout=1800
                )
                rows.setdefault(case.name, []).append(json.loads(Path(file.name).read_text()))
    return rows


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and date: without them a figure says nothing."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native_cpu.instruction_set,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastopt": fastopt.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family[0]}, model {family[1]})" if all(family) else name


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"

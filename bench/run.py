"""Runs the cases, each in several fresh processes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import operators, probes
from bench.results import ROOT, Measured, Process, provenance
from bench.timing import interleaved


def run_case(name: str, quick: bool) -> Process:
    """Checks and times one case in this process."""
    operator, case = operators.find(name)
    torch.set_num_threads(case.threads)
    operator.check_parity(case)
    rounds = max(3, case.rounds // 20) if quick else case.rounds
    timings = interleaved(operator.contenders(case), rounds)
    return Process(
        timings={name: dataclasses.asdict(timing) for name, timing in timings.items()},
        figures=operator.figures(case),
    )


def run_memory(name: str, contender: str) -> int:
    """Bytes that one call of a contender takes, in this process, which has done nothing else."""
    operator, case = operators.find(name)
    torch.set_num_threads(case.threads)
    small = operator.contenders(operator.clipped(case))[contender]
    return probes.memory_growth(small, operator.contenders(case)[contender])


def run_processes(pattern: str, processes: int, quick: bool) -> dict[str, Measured]:
    """Runs every case in several fresh processes, one at a time."""
    rows: dict[str, Measured] = {}
    names = [case.name for operator in operators.OPERATORS for case in operator.cases]
    for name in names:
        if pattern not in name:
            continue
        measured = []
        for number in range(processes):
            print(f"{name}: process {number + 1} of {processes}", file=sys.stderr, flush=True)
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, "-m", "bench", "--case", name, "--json", file.name]
                subprocess.run(
                    command + (["--quick"] if quick else []), cwd=ROOT, check=True, timeout=1800
                )
                measured.append(json.loads(Path(file.name).read_text()))
        rows[name] = {**provenance(), "processes": measured}
    return rows

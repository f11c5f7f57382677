"""A machine's file of results: what it holds, how it is read, and how rows are merged into it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, TypedDict

import torch
from typing_extensions import NotRequired

import fastopt
from fastopt import _native_cpu

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"

# Where these differ, figures are not of one machine.
IDENTITY = ("processor", "threads", "instruction_set", "torch")


class Process(TypedDict):
    """What one process measured: seconds of each contender, and other figures."""

    timings: dict[str, dict[str, Any]]
    figures: dict[str, float]


class Provenance(TypedDict):
    """The state of the sources that were measured, and when."""

    fastopt: str
    commit: str
    date: str


class Measured(Provenance):
    """A row."""

    processes: list[Process]


class Losses(Provenance):
    """By program, for each seed the validation loss of each way to store."""

    programs: dict[str, list[dict[str, float]]]


class Memory(Provenance):
    """The peak of each way to train a model of so many parameters, in bytes."""

    parameters: int
    peaks: dict[str, int]


class Distributed(Provenance):
    """Seconds of a step and the furthest loss of each contender on several processes."""

    steps: int
    ranks: int
    contenders: dict[str, dict[str, float]]


class Result(TypedDict):
    """A file: rows by name."""

    machine: dict[str, Any]
    cases: dict[str, Measured]
    losses: NotRequired[Losses]
    memory: NotRequired[Memory]
    distributed: NotRequired[Distributed]


class OtherMachineError(Exception):
    """A file holds the figures of another machine or another torch."""


def load(path: Path) -> Result:
    """Reads a file; one written before rows had a commit has its machine's for all of them."""
    return upgraded(json.loads(path.read_text()))


def upgraded(content: dict[str, Any]) -> Result:
    """The present form of a file's content."""
    machine = dict(content["machine"])
    provenance = {key: machine.pop(key) for key in ("fastopt", "commit", "date") if key in machine}
    cases: dict[str, Measured] = {}
    for name, measured in content["cases"].items():
        if isinstance(measured, list):
            processes = [Process(timings=timings, figures={}) for timings in measured]
            measured = {**provenance, "processes": processes}
        cases[name] = measured
    result: Result = {**content, "machine": machine, "cases": cases}  # type: ignore[typeddict-item]
    return result


def to_extend(path: Path | None) -> Result:
    """What new rows are merged into: the file, or nothing yet.

    Raises:
        OtherMachineError: The file's rows were measured elsewhere.
    """
    here = machine()
    if path is None or not path.exists():
        return Result(machine=here, cases={})
    result = load(path)
    for key in IDENTITY:
        if result["machine"].get(key) != here[key]:
            raise OtherMachineError(
                f"{path} holds rows of {key} {result['machine'].get(key)!r}, here it is "
                f"{here[key]!r}: name another --output"
            )
    return result


def save(result: Result, path: Path) -> None:
    """Writes a file."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Hardware and versions: without them a figure says nothing."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native_cpu.instruction_set,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def provenance() -> Provenance:
    """What is measured, and when."""
    return {
        "fastopt": fastopt.__version__,
        "commit": os.environ.get("FASTOPT_COMMIT") or _git("rev-parse", "--short", "HEAD"),
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

"""What the machine can do, and what a step takes of it besides time."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from bench.results import ROOT
from bench.timing import OURS, Contender
from fastopt import _native_cpu

Result = TypeVar("Result")

# A growth below this is not told from what allocators and libraries take for themselves.
LEAST_GROWTH = 4 * 1024 * 1024


def fma_peak(dtype: torch.dtype, threads: int) -> float:
    """Operations per second of fused multiply-adds on registers, two for each.

    bf16 is held to fp32's, which an instruction that multiplies pairs of bf16 can exceed.
    """
    single = max(_native_cpu.fma_peak(threads) for _ in range(5))
    return single / 2 if dtype is torch.float64 else single


def memory_growths(case_name: str, stock: str = "torch default") -> dict[str, float] | None:
    """Our growth of resident memory in one call, and over stock's; none where that is too small.

    Each is measured in a fresh process: memory that was freed is not always given back.
    """
    ours, theirs = (_growth_in_process(case_name, name) for name in (OURS, stock))
    if theirs < LEAST_GROWTH:
        return None
    return {"memory": ours / theirs, "mebibytes": ours / 2**20}


def _growth_in_process(case_name: str, contender: str) -> int:
    command = [sys.executable, "-m", "bench", "--case", case_name, "--memory", contender]
    result = subprocess.run(command, cwd=ROOT, check=True, timeout=600, stdout=subprocess.PIPE)
    return int(result.stdout)


def memory_growth(small: Contender, contender: Contender) -> int:
    """Bytes that a call adds to the resident memory at its highest.

    ``small`` is called first: it loads libraries and starts threads. ``ru_maxrss`` would not do: a
    process inherits it from its parent.
    """
    small.call()
    contender.prepare()
    growth, _ = growth_of(contender.call)
    return growth


def growth_of(function: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes that a call adds to the resident memory at its highest, and what it returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the present again
    before = _resident("VmRSS")
    result = function()
    return _resident("VmHWM") - before, result


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")

"""Times contenders in turn, in one process, so that a slow moment of the machine hits them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

OURS = "fastopt"


@dataclass(frozen=True)
class Contender:
    """What is timed, and what has to be done before each call without counting."""

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over many rounds."""

    median: float
    minimum: float
    quartiles: tuple[float, float]
    rounds: int


def interleaved(contenders: dict[str, Contender], rounds: int) -> dict[str, Timing]:
    """Gives every contender a turn in each round, the order turned by one each time.

    A turn is a call that does not count and one that does: the first brings back into the caches
    what the contender before has pushed out, which is no part of anybody's step.

    Args:
        contenders: What to time, by name.
        rounds: How many times, after two rounds that do not count.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_number in range(-2, rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            contender = contenders[name]
            contender.prepare()
            contender.call()
            contender.prepare()
            start = time.perf_counter()
            contender.call()
            seconds = time.perf_counter() - start
            if round_number >= 0:
                samples[name].append(seconds)
    return {name: _summary(values) for name, values in samples.items()}


def on_one_thread(contender: Contender, threads: int) -> Contender:
    """The contender on one thread; those after it have ``threads`` again."""

    def run() -> None:
        torch.set_num_threads(1)
        contender.call()
        torch.set_num_threads(threads)

    return Contender(run, contender.prepare)


def _summary(samples: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, min(samples), (lower, upper), len(samples))

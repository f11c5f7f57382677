"""Tells ``auto`` which backend a card runs fastest, from the results of ``make gpu``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench.gpu_operators import OPERATORS, TRITON
from bench.results import ROOT
from bench.timing import OURS

PATH = ROOT / "fastopt" / "backends" / "measured_table.py"

Key = tuple[str, str, int]


def fastest(cards: Iterable[Mapping[str, Any]]) -> dict[Key, str]:
    """By operator, dtype and compute capability: ``triton``, where it beats ``cuda`` on average.

    The average is the geometric mean over all rows; a simulator has nothing to say.
    """
    ratios: dict[Key, list[float]] = {}
    for card in cards:
        if card["simulated"] or "machine" not in card:
            continue
        capability = int(card["machine"]["capability"])
        for operator in OPERATORS:
            for case in operator.cases:
                timings = card["cases"].get(case.name, {})
                if OURS in timings and TRITON in timings:
                    ratio = timings[TRITON]["median"] / timings[OURS]["median"]
                    ratios.setdefault((operator.name, str(case.dtype), capability), []).append(
                        ratio
                    )
    means = {key: math.exp(statistics.fmean(map(math.log, own))) for key, own in ratios.items()}
    return {key: "triton" for key, mean in sorted(means.items()) if mean < 1}


def write(cards: Iterable[Mapping[str, Any]]) -> None:
    """Writes the module that ``fastopt.backends.measured`` reads."""
    text = PATH.read_text()
    head = text[: text.index("FASTEST")]
    found = fastest(cards)
    rows = "".join(f"    {key!r}: {name!r},\n" for key, name in found.items()).replace("'", '"')
    body = f"{{\n{rows}}}" if rows else "{}"
    PATH.write_text(f"{head}FASTEST: dict[tuple[str, str, int], str] = {body}\n")

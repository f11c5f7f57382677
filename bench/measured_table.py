"""Tells ``auto`` which backend a card runs fastest, from the results of ``make gpu``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench.gpu_operators import OPERATORS, TRITON, GpuOperator
from bench.results import ROOT
from bench.timing import OURS
from fastopt.backends.contract import (
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
    TwinAttentionRequest,
)

PATH = ROOT / "fastopt" / "backends" / "measured_table.py"

Key = tuple[str, str, int]

# The operators that have requests which ``auto`` may leave to stock.
REQUESTS = (ParameterRequest, LstmRequest, TwinAttentionRequest, LinearCrossEntropyRequest)
MAY_BE_STOCK = {request.operator for request in REQUESTS if request.may_be_stock}

# Of the time of ``cuda``: two runs differ by less.
CLEARLY_FASTER = 0.95


def fastest(cards: Iterable[Mapping[str, Any]]) -> dict[Key, str]:
    """By operator, dtype and compute capability: who is clearly faster than ``cuda`` on average.

    The average is the geometric mean over all rows; a simulator has nothing to say.
    """
    ratios: dict[Key, list[dict[str, float]]] = {}
    for card in cards:
        if card["simulated"] or "machine" not in card:
            continue
        capability = int(card["machine"]["capability"])
        for operator in OPERATORS:
            for case in operator.cases:
                row = _ratios(operator, card["cases"].get(case.name, {}))
                if row:
                    key = operator.name, str(case.dtype), capability
                    ratios.setdefault(key, []).append(row)
    found = {}
    for key, rows in sorted(ratios.items()):
        means = {name: statistics.geometric_mean(row[name] for row in rows) for name in rows[0]}
        best = min(means, key=lambda name: means[name])
        if means[best] < CLEARLY_FASTER:
            found[key] = best
    return found


def _ratios(operator: GpuOperator, timings: Mapping[str, Any]) -> dict[str, float]:
    """Of the other backends' times to that of ``cuda``; nothing where one was not timed."""
    stock = operator.stock if operator.name in MAY_BE_STOCK else ()
    columns = {"triton": (TRITON,), "torch": stock}
    found = {}
    for backend, names in columns.items():
        taken = next((name for name in names if name in timings), None)
        if taken and OURS in timings:
            found[backend] = timings[taken]["median"] / timings[OURS]["median"]
    expected = [backend for backend, names in columns.items() if names]
    return found if list(found) == expected else {}


def write(cards: Iterable[Mapping[str, Any]]) -> None:
    """Writes the module that ``fastopt.backends.measured`` reads."""
    text = PATH.read_text()
    head = text[: text.index("FASTEST")]
    found = fastest(cards)
    rows = "".join(f"    {key!r}: {name!r},\n" for key, name in found.items()).replace("'", '"')
    body = f"{{\n{rows}}}" if rows else "{}"
    PATH.write_text(f"{head}FASTEST: dict[tuple[str, str, int], str] = {body}\n")

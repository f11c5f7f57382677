"""The operators that are measured, each with what the run and the report have to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench import (
    attention_contenders,
    linear_cross_entropy_contenders,
    lstm_contenders,
    optimizer_contenders,
    probes,
)
from bench.attention_cases import ATTENTION_CASES
from bench.cases import Case, ComputeCase
from bench.linear_cross_entropy_cases import CHUNKED, LINEAR_CROSS_ENTROPY_CASES
from bench.lstm_cases import LSTM_CASES
from bench.optimizer_cases import OPTIMIZER_CASES
from bench.results import Process
from bench.timing import OURS, Contender


@dataclass(frozen=True)
class Column:
    """A figure of the report besides times: one value for each process, of which the worst counts.

    Attributes:
        head: Of the table's column.
        value: From a case and what a process measured; none: an empty cell.
        worst: ``min`` or ``max``.
        form: A format specification.
    """

    head: str
    value: Callable[[Any, Process], float | None]
    worst: Callable[..., float]
    form: str

    def figure(self, case: Case, processes: list[Process]) -> float | None:
        """The worst of the processes; none, unless each has one."""
        values = [self.value(case, process) for process in processes]
        known = [value for value in values if value is not None]
        return self.worst(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Operator:
    """One table of the report.

    Attributes:
        cases: Its rows, all of one group.
        check_parity: Raises before a case is timed that gives wrong numbers.
        clipped: A case that is small, yet of the same kind.
        contenders: What is timed, ours under the name ``OURS``.
        stock: Names of the contenders among which the best of stock is sought.
        limit: The fraction of the machine's limit; the bars name it by its head.
        peers: Names of contenders that are neither ours nor stock.
        figures: What is measured after the times, in the same process.
        columns: What the table shows besides times.
        note: A sentence or two above the table.
    """

    cases: tuple[Case, ...]
    check_parity: Callable[[Any], None]
    clipped: Callable[[Any], Any]
    contenders: Callable[[Any], dict[str, Contender]]
    stock: tuple[str, ...]
    limit: Column
    peers: tuple[str, ...] = ()
    figures: Callable[[Any], dict[str, float]] = lambda case: {}
    columns: tuple[Column, ...] = ()
    note: str = ""

    @property
    def group(self) -> str:
        """What its table is called."""
        return self.cases[0].group


def _compute_figures(case: ComputeCase) -> dict[str, float]:
    figures = {"fma_peak": probes.fma_peak(case.dtype, case.threads)}
    memory = probes.memory_growths(case.name) if case.mode == "training" else None
    return figures if memory is None else {**figures, **memory}


def _flops_per_second(case: ComputeCase, process: Process) -> float:
    return case.flops / float(process["timings"][OURS]["median"])


# For every operator that multiplies matrices.
GIGAFLOPS = Column("GF/s", lambda case, process: _flops_per_second(case, process) / 1e9, min, ".0f")
OF_PEAK = Column(
    "FMA peak",
    lambda case, process: _flops_per_second(case, process) / process["figures"]["fma_peak"],
    min,
    ".0%",
)
MEMORY = Column("memory", lambda case, process: process["figures"].get("memory"), max, ".2f")
MEBIBYTES = Column(
    "fastopt adds, MiB", lambda case, process: process["figures"].get("mebibytes"), max, ",.0f"
)
COMPUTE_NOTE = (
    "Training is forward and backward with every gradient. GF/s is useful work, the matrix "
    "products of tokens that are there; next to it is its fraction of the peak of fused "
    "multiply-adds, measured in the same process. Memory is what one training step adds at its "
    "highest, fastopt's over stock's: below 1, fastopt takes less."
)

OPTIMIZERS = Operator(
    cases=OPTIMIZER_CASES,
    check_parity=optimizer_contenders.check_parity,
    clipped=optimizer_contenders.clipped,
    contenders=optimizer_contenders.optimizer_contenders,
    stock=optimizer_contenders.STOCK,
    peers=optimizer_contenders.PEERS,
    limit=Column(
        "add_'s bandwidth",
        lambda case, process: optimizer_contenders.bandwidth_fraction(case, process["timings"]),
        min,
        ".0%",
    ),
)


def _compute_operator(
    cases: tuple[Case, ...],
    module: Any,
    contenders: Callable[[Any], dict[str, Contender]],
    *more_columns: Column,
) -> Operator:
    """One whose limit is arithmetic, from the module that has its contenders."""
    return Operator(
        cases=cases,
        check_parity=module.check_parity,
        clipped=module.clipped,
        contenders=contenders,
        stock=module.STOCK,
        peers=module.PEERS,
        limit=OF_PEAK,
        figures=_compute_figures,
        columns=(GIGAFLOPS, OF_PEAK, MEMORY, *more_columns),
        note=COMPUTE_NOTE,
    )


LSTM = _compute_operator(LSTM_CASES, lstm_contenders, lstm_contenders.lstm_contenders)
ATTENTION = _compute_operator(
    ATTENTION_CASES, attention_contenders, attention_contenders.attention_contenders, MEBIBYTES
)


def _linear_cross_entropy_figures(case: ComputeCase) -> dict[str, float]:
    """Beside the others, memory over that of torch in chunks."""
    figures = _compute_figures(case)
    if CHUNKED in linear_cross_entropy_contenders.named(case) and case.mode == "training":
        chunked = probes.memory_growths(case.name, CHUNKED)
        figures |= {} if chunked is None else {"memory over chunked": chunked["memory"]}
    return figures


LINEAR_CROSS_ENTROPY = replace(
    _compute_operator(
        LINEAR_CROSS_ENTROPY_CASES,
        linear_cross_entropy_contenders,
        linear_cross_entropy_contenders.linear_cross_entropy_contenders,
        Column(
            "memory over chunked",
            lambda case, process: process["figures"].get("memory over chunked"),
            max,
            ".2f",
        ),
        MEBIBYTES,
    ),
    figures=_linear_cross_entropy_figures,
)

OPERATORS = (OPTIMIZERS, LSTM, ATTENTION, LINEAR_CROSS_ENTROPY)


def find(case_name: str) -> tuple[Operator, Case]:
    """The case of this name and its operator."""
    ((operator, case),) = [
        (operator, case)
        for operator in OPERATORS
        for case in operator.cases
        if case.name == case_name
    ]
    return operator, case

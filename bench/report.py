"""Turns committed results into the tables and pictures of README and docs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import distributed, gpu_operators, measured_table, results, training
from bench.cases import BEST_OF_STOCK, Case
from bench.gpu import gpu_table
from bench.operators import OPERATORS, OPTIMIZERS, Operator
from bench.optimizer_cases import OWN_FP32, OptimizerCase
from bench.results import ROOT, Measured, Provenance, Result
from bench.support import support_table
from bench.timing import OURS


@dataclass(frozen=True)
class Row:
    """A case's figures; each is the worst of the processes."""

    operator: Operator
    case: Case
    measured: Measured
    milliseconds: float
    spread: float  # (third - first quartile) / median of ours
    ratios: dict[str, float]  # contender's median over ours

    @property
    def best_of_stock(self) -> tuple[str, float]:
        """Stock's fastest form and its ratio to ours."""
        stock = [name for name in self.ratios if name in self.operator.stock]
        name = min(stock, key=lambda name: self.ratios[name])
        return name, self.ratios[name]

    def verdicts(self) -> list[str]:
        """Each bar with the measured figure, in words."""
        texts = []
        ratios = {**self.ratios, BEST_OF_STOCK: self.best_of_stock[1]}
        for bar in self.case.bars:
            if bar.contender not in ratios:
                texts.append(f"{bar.ratio:g}x {bar.contender}: not measured")
                continue
            ratio = ratios[bar.contender]
            word = "reached" if ratio >= bar.ratio else "**missed**"
            texts.append(f"{bar.ratio:g}x {bar.contender}: {ratio:.2f}x, {word}")
        limit = self.operator.limit
        fraction = limit.figure(self.case, self.measured["processes"])
        if self.case.limit_bar and fraction is not None:
            word = "reached" if fraction >= self.case.limit_bar else "**missed**"
            texts.append(f"{self.case.limit_bar:.0%} of {limit.head}: {fraction:.0%}, {word}")
        return texts


def rows_of(result: Result, operator: Operator) -> list[Row]:
    """One operator's rows in a machine's file, in the order of the cases."""
    return [
        _row(operator, case, result["cases"][case.name])
        for case in operator.cases
        if case.name in result["cases"]
    ]


def _row(operator: Operator, case: Case, measured: Measured) -> Row:
    runs = [process["timings"] for process in measured["processes"]]
    named = {*operator.stock, *operator.peers, *(bar.contender for bar in case.bars)}
    ratios = {
        name: min(run[name]["median"] / run[OURS]["median"] for run in runs)
        for name in runs[0]
        if name in named
    }
    slowest = max(runs, key=lambda run: run[OURS]["median"])[OURS]
    spread = (slowest["quartiles"][1] - slowest["quartiles"][0]) / slowest["median"]
    return Row(operator, case, measured, slowest["median"] * 1e3, spread, ratios)


def tables(result: Result) -> Iterator[tuple[Operator, str]]:
    """A Markdown table for each operator that was measured."""
    for operator in OPERATORS:
        if rows := rows_of(result, operator):
            yield operator, _table(result, operator, rows)


def text(result: Result) -> str:
    """All tables, each under its heading."""
    return "\n\n".join(f"### {operator.group}\n\n{table}" for operator, table in tables(result))


def _table(result: Result, operator: Operator, rows: list[Row]) -> str:
    """Ratios above 1 are ours, below 1 stock's."""
    contenders = [*operator.stock, *operator.peers]
    figures = [column.head for column in operator.columns]
    head = ["case", "fastopt, ms", "spread", *figures, *contenders, "bars"]
    lines = [
        f"{_machine(result)}, {_provenance(rows)}. "
        f"Each figure is the worst of {_processes(rows)} processes; columns give the "
        "contender's median over fastopt's, so above 1 fastopt is faster. In bold, the best of "
        "stock." + (f" {operator.note}" if operator.note else ""),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        best = row.best_of_stock[0]
        cells = [row.case.name, f"{row.milliseconds:.3g}", f"{row.spread:.0%}"]
        for column in operator.columns:
            figure = column.figure(row.case, row.measured["processes"])
            cells.append("" if figure is None else format(figure, column.form))
        for name in contenders:
            if name not in row.ratios:
                cells.append("")
            else:
                ratio = f"{row.ratios[name]:.2f}"
                cells.append(f"**{ratio}**" if name == best else ratio)
        cells.append("<br>".join(row.verdicts()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['processor']}, {machine['instruction_set']}, torch {machine['torch']}"


def _state(measured: Provenance) -> str:
    """Of the sources that were measured."""
    return f"fastopt {measured['fastopt']} at {measured['commit']}, {measured['date']}"


def _provenance(rows: list[Row]) -> str:
    """Versions and dates; where rows differ, the rarer ones with the rows that they are of."""
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(_state(row.measured), []).append(row.case.name)
    usual, *others = sorted(names, key=lambda state: -len(names[state]))
    return usual + "".join(f"; {state}, for {'; '.join(names[state])}" for state in others)


def _processes(rows: list[Row]) -> str:
    counts = sorted({len(row.measured["processes"]) for row in rows})
    return " to ".join(dict.fromkeys(str(count) for count in (counts[0], counts[-1])))


def picture(result: Result, operator: Operator, path: Path) -> None:
    """A bar for each case: how many times faster than the best of stock."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastopt"
    from matplotlib import pyplot

    rows = rows_of(result, operator)
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(rows) + 1.3))
    values = [row.best_of_stock[1] for row in rows]
    colors = ["#2a78d6" if value >= 1 else "#c2453c" for value in values]
    axes.barh([row.case.name for row in rows], values, color=colors)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *values) * 0.95, max(1, *values) * 1.6)
    axes.set_xticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
    axes.minorticks_off()
    axes.invert_yaxis()
    for place, row in enumerate(rows):
        name, value = row.best_of_stock
        axes.text(max(value, 1) * 1.03, place, f"{value:.2f}x {name}", va="center", fontsize=8)
    axes.set_xlabel(
        f"times faster than the best of stock (worst of {_processes(rows)} processes)\n"
        f"{result['machine']['processor']}, torch {result['machine']['torch']}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def committed_results() -> list[Path]:
    """Every machine's file but the one that ``make bench`` writes for oneself."""
    paths = sorted(results.FOLDER.glob("*.json"))
    return [p for p in paths if p.name != "local.json" and not p.name.startswith("gpu-")]


def gpu_results() -> list[Path]:
    """What ``make gpu`` has written on machines with cards."""
    return sorted(results.FOLDER.glob("gpu-*.json"))


def render() -> None:
    """Writes what backends take, and tables and pictures of committed results, into the pages.

    Which backend a card runs fastest goes to where ``auto`` looks it up.
    """
    for path in committed_results():
        result = results.load(path)
        for operator, _ in tables(result):
            picture(result, operator, _picture_path(path, operator))
    measured_table.write(_cards())
    for path, text in rendered_pages().items():
        path.write_text(text)


def rendered_pages() -> dict[Path, str]:
    """README and docs as they are to be: with what was measured between their marks."""
    parts = {
        "README.md": {"headline": headline_table()},
        "docs/backends.md": {"support": support_table() + "\n"},
        "docs/benchmarks.md": {"bench": benchmark_tables()},
        "docs/frameworks.md": {"distributed": distributed_tables()},
        "docs/optimizers.md": storage_tables(),
    }
    pages = {}
    for name, marked in parts.items():
        text = (ROOT / name).read_text()
        for mark, part in marked.items():
            text = _between(mark, part, text)
        pages[ROOT / name] = text
    return pages


def headline_table() -> str:
    """A row for each operator and machine: how often we are faster than stock, and by how much."""
    found: list[tuple[str, str, list[float]]] = []
    for path in committed_results():
        result = results.load(path)
        machine = f"{_machine(result)}, {result['machine']['threads']} threads"
        for operator, _ in tables(result):
            ratios = [row.best_of_stock[1] for row in rows_of(result, operator)]
            found.append((operator.group, machine, ratios))
    for card in _cards():
        if card["simulated"] or "machine" not in card:
            continue
        machine = f"{card['machine']['card']}, torch {card['machine']['torch']}"
        for measured in gpu_operators.OPERATORS:
            ratios = list(gpu_operators.best_of_stock(measured, card["cases"]).values())
            if ratios:
                found.append((measured.cases[0].group, machine, ratios))
    lines = [
        "| | cases | faster than stock | median | from | to | measured on |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for group, machine, ratios in found:
        wins = sum(ratio > 1 for ratio in ratios)
        span = " | ".join(f"{f(ratios):.2f}x" for f in (median, min, max))
        lines.append(f"| {group} | {len(ratios)} | {wins} | {span} | {machine} |")
    return "\n".join(lines) + "\n"


def benchmark_tables() -> str:
    """Every case on every machine, with a picture for each operator."""
    parts = []
    for path in committed_results():
        result = results.load(path)
        for operator, table in tables(result):
            svg = _picture_path(path, operator).relative_to(ROOT)
            heading = f"## {operator.group}, {result['machine']['processor']}"
            parts += [heading, "", f"![speed-up](../{svg})", "", table, ""]
    parts += ["## On a card", ""]
    for card in _cards() or [None]:
        parts += [gpu_table(card), ""]
    return "\n".join(parts)


def _cards() -> list[Any]:
    return [json.loads(path.read_text()) for path in gpu_results()]


def _picture_path(path: Path, operator: Operator) -> Path:
    return path.with_name(f"{path.stem}-{operator.group.lower()}.svg")


def distributed_tables() -> str:
    """Steps on several processes, of every machine that measured them."""
    return _part_tables("distributed", distributed.table)


def storage_tables() -> dict[str, str]:
    """What was measured of state in fewer bytes, on every machine, by the name of its marks."""
    storage = [line for path in committed_results() for line in storage_table(results.load(path))]
    return {
        "storage": "\n".join(storage),
        "losses": _part_tables("losses", training.loss_table),
        "memory": _part_tables("memory", training.memory_table),
    }


def _part_tables(key: str, table: Callable[[Any], str]) -> str:
    """A part of every file that has it."""
    lines = []
    for path in committed_results():
        result = results.load(path)
        measured: Any = result.get(key)
        if measured:
            lines += [f"{_machine(result)}, {_state(measured)}.", "", table(measured), ""]
    return "\n".join(lines)


def storage_table(result: Result) -> list[str]:
    """How much faster a step is than our own in fp32; no lines where that was not measured."""
    rows = [row for row in rows_of(result, OPTIMIZERS) if OWN_FP32 in row.ratios]
    if not rows:
        return []
    lines = [
        f"{_machine(result)}, {_provenance(rows)}; the worst of {_processes(rows)} processes.",
        "",
        "| AdamW of 16.8 million parameters | bytes moved, each | a step, ms | against fp32 |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        name = row.case.name.removeprefix("AdamW ").removesuffix(", 16.8M")
        assert isinstance(row.case, OptimizerCase)
        moved, ratio = row.case.bytes_per_element, row.ratios[OWN_FP32]
        lines.append(f"| {name} | {moved} | {row.milliseconds:.3g} | {ratio:.2f}x |")
    return [*lines, ""]


def _between(name: str, part: str, text: str) -> str:
    """The text with a part of it replaced, which stands between marks of a name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{part}{end}{rest.split(end)[1]}"

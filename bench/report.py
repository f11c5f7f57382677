"""Turns committed results into the README's table and picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import OPTIMIZER_CASES, OptimizerCase
from bench.contenders import OURS, STOCK
from bench.gpu import gpu_table
from bench.run import BANDWIDTH_PROBE, ROOT

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass(frozen=True)
class Row:
    """A case's figures; each is the worst of the processes."""

    case: OptimizerCase
    milliseconds: float
    spread: float  # (third - first quartile) / median of ours
    ratios: dict[str, float]  # contender's median over ours
    bandwidth: float | None  # fraction of add_'s

    @property
    def best_of_stock(self) -> tuple[str, float]:
        """Stock's fastest form and its ratio to ours."""
        name = min((n for n in self.ratios if n in STOCK), key=lambda n: self.ratios[n])
        return name, self.ratios[name]

    def verdicts(self) -> list[str]:
        """Each bar with the measured figure, in words."""
        texts = []
        for bar in self.case.bars:
            if bar.contender not in self.ratios:
                texts.append(f"{bar.ratio:g}x {bar.contender}: not measured")
                continue
            ratio = self.ratios[bar.contender]
            word = "reached" if ratio >= bar.ratio else "**missed**"
            texts.append(f"{bar.ratio:g}x {bar.contender}: {ratio:.2f}x, {word}")
        if self.bandwidth is not None:
            word = "reached" if self.bandwidth >= self.case.bandwidth_bar else "**missed**"
            texts.append(
                f"{self.case.bandwidth_bar:.0%} of add_'s bandwidth: {self.bandwidth:.0%}, {word}"
            )
        return texts


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of one machine's file, in the order of the cases."""
    return [
        _row(case, result["cases"][case.name])
        for case in OPTIMIZER_CASES
        if case.name in result["cases"]
    ]


def _row(case: OptimizerCase, processes: list[dict[str, Any]]) -> Row:
    names = [name for name in processes[0] if name not in (OURS, BANDWIDTH_PROBE)]
    ratios = {
        name: min(run[name]["median"] / run[OURS]["median"] for run in processes) for name in names
    }
    slowest = max(processes, key=lambda run: run[OURS]["median"])[OURS]
    spread = (slowest["quartiles"][1] - slowest["quartiles"][0]) / slowest["median"]
    bandwidth = None
    if BANDWIDTH_PROBE in processes[0]:
        probe_bytes = 12 * 16 * 1024 * 1024
        bandwidth = min(
            (case.elements * case.bytes_per_element / run[OURS]["median"])
            / (probe_bytes / run[BANDWIDTH_PROBE]["median"])
            for run in processes
        )
    return Row(case, slowest["median"] * 1e3, spread, ratios, bandwidth)


def table(result: dict[str, Any]) -> str:
    """A Markdown table: ratios above 1 are ours, below 1 stock's."""
    machine = result["machine"]
    contenders = [*STOCK, "DeepSpeed CPUAdam"]
    head = ["case", "fastopt, ms", "spread", *contenders, "bars"]
    lines = [
        f"{machine['processor']}, {machine['instruction_set']}, torch {machine['torch']}, "
        f"fastopt {machine['fastopt']} at {machine['commit']}, {machine['date']}. "
        f"Each figure is the worst of {result['processes']} processes; columns give the "
        "contender's median over fastopt's, so above 1 fastopt is faster. In bold, the best of "
        "stock.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows_of(result):
        best = row.best_of_stock[0]
        cells = [row.case.name, f"{row.milliseconds:.3g}", f"{row.spread:.0%}"]
        for name in contenders:
            if name not in row.ratios:
                cells.append("")
            else:
                text = f"{row.ratios[name]:.2f}"
                cells.append(f"**{text}**" if name == best else text)
        cells.append("<br>".join(row.verdicts()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(result: dict[str, Any], path: Path) -> None:
    """A bar for each case: how many times faster than the best of stock."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastopt"
    from matplotlib import pyplot

    rows = rows_of(result)
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(rows) + 1.3))
    values = [row.best_of_stock[1] for row in rows]
    colors = ["#2a78d6" if value >= 1 else "#c2453c" for value in values]
    axes.barh([row.case.name for row in rows], values, color=colors)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *values) * 0.95, max(values) * 1.6)
    axes.set_xticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
    axes.minorticks_off()
    axes.invert_yaxis()
    for place, row in enumerate(rows):
        name, value = row.best_of_stock
        axes.text(max(value, 1) * 1.03, place, f"{value:.2f}x {name}", va="center", fontsize=8)
    machine = result["machine"]
    axes.set_xlabel(
        "times faster than the best of stock (worst of "
        f"{result['processes']} processes)\n{machine['processor']}, torch {machine['torch']}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def committed_results() -> list[Path]:
    """Every machine's file but the one that ``make bench`` writes for oneself."""
    paths = sorted(RESULTS.glob("*.json"))
    return [p for p in paths if p.name != "local.json" and not p.name.startswith("gpu-")]


def gpu_results() -> list[Path]:
    """What ``make gpu`` has written on machines with cards."""
    return sorted(RESULTS.glob("gpu-*.json"))


def render() -> None:
    """Writes table and picture of every committed result into the README."""
    parts = []
    for path in committed_results():
        result = json.loads(path.read_text())
        svg = path.with_suffix(".svg")
        picture(result, svg)
        parts += [f"![speed-up]({svg.relative_to(ROOT)})", "", table(result), ""]
    parts += ["### On a card", ""]
    on_cards = [json.loads(path.read_text()) for path in gpu_results()]
    for card in on_cards or [None]:
        parts += [gpu_table(card), ""]
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text("\n".join([before + BEGIN, "", *parts]) + END + after)

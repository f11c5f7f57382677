"""Tables, checks and the plot of a contest between contenders."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from _contest import Record
from _corpus import Corpus, Split, label_names
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from rich.table import Table
from sklearn.metrics import accuracy_score, f1_score, recall_score

FIRST_STEPS = 50
FIRST_LOSSES_TOLERANCE = 1e-4
VALIDATION_TOLERANCE = 0.02


def figures_table(title: str, *heads: str) -> Table:
    """A table of figures, but for its first column, which says what they are of."""
    table = Table(*heads, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def corpus_table(corpus: Corpus, parts: Split) -> Table:
    table = figures_table("Data", "texts", "count")
    table.add_row("read", f"{corpus.read:,}")
    for reason, count in corpus.dropped.items():
        table.add_row(f"  dropped: {reason}", f"{count:,}")
    table.add_section()
    for name, examples in parts._asdict().items():
        labels = len(label_names(examples))
        table.add_row(name, f"{len(examples):,}" + (f" in {labels} labels" if labels > 1 else ""))
    return table


def timing_table(records: Mapping[str, Record], stock: Collection[str]) -> Table:
    """Compares epochs with the fastest of stock's, the tail with the first contender's."""
    table = figures_table(
        "Training (medians; tail = clip, step, average, zero_grad; "
        "epoch ratio = best of stock / this; tail ratio = first / this)",
        "contender", "epochs", "epoch s", "epoch ratio", "step ms", "tail ms", "tail share",
        "total s", "tail ratio",
    )  # fmt: skip
    first = next(iter(records.values()))
    best_of_stock = min(median(records[name].epoch_seconds) for name in stock)
    for name, record in records.items():
        # Contenders may stop early: compare the steps that both have made.
        shared = slice(min(len(record.losses), len(first.losses)))
        steps, tails = record.step_seconds, record.tail_seconds
        epoch = median(record.epoch_seconds)
        table.add_row(
            name,
            str(len(record.epoch_ends)),
            f"{epoch:.1f}",
            f"{best_of_stock / epoch:.2f}",
            f"{median(steps) * 1e3:.2f}",
            f"{median(tails) * 1e3:.2f}",
            f"{sum(tails) / sum(steps):.1%}",
            f"{sum(steps):.1f}",
            f"{median(first.tail_seconds[shared]) / median(tails[shared]):.2f}",
        )
    return table


def scores_table(
    title: str,
    heads: Sequence[str],
    scores: Mapping[str, Sequence[str]],
    records: Mapping[str, Record],
) -> Table:
    """What models reach, and the best validation loss of those that were trained here."""
    table = figures_table(title, "model", *heads, "best validation loss")
    for name, reached in scores.items():
        loss = f"{min(records[name].validation_losses):.4f}" if name in records else ""
        table.add_row(name, *reached, loss)
    return table


def quality_table(
    predictions: Mapping[str, NDArray[np.int64]],
    targets: NDArray[np.int64],
    records: Mapping[str, Record],
) -> Table:
    scores = {
        name: (
            f"{accuracy_score(targets, predicted):.4f}",
            f"{recall_score(targets, predicted, average='macro', zero_division=0):.4f}",
            f"{f1_score(targets, predicted, average='macro', zero_division=0):.4f}",
        )
        for name, predicted in predictions.items()
    }
    return scores_table("Test split", ("accuracy", "macro recall", "macro F1"), scores, records)


def parity_table(records: Mapping[str, Record]) -> Table:
    """Checks that the others learn what the first contender learns."""
    table = Table(
        "contender", "check", "measured", "allowed", "verdict",
        title="Same losses as the first contender?", title_justify="left",
    )  # fmt: skip
    (_, stock), *others = records.items()
    for name, record in others:
        checks = (
            (f"first {min(FIRST_STEPS, len(stock.losses))} losses", FIRST_LOSSES_TOLERANCE,
             relative_difference(record.losses[:FIRST_STEPS], stock.losses[:FIRST_STEPS])),
            ("best validation loss", VALIDATION_TOLERANCE,
             relative_difference(
                 [min(record.validation_losses)], [min(stock.validation_losses)])),
        )  # fmt: skip
        for check, allowed, measured in checks:
            verdict = "[green]PASS[/]" if measured <= allowed else "[bold red]FAIL[/]"
            table.add_row(name, check, f"{measured:.1e}", f"{allowed:.0e}", verdict)
    return table


def relative_difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the largest relative difference; NaN, which passes no check, if a value is NaN."""
    a, e = np.asarray(actual), np.asarray(expected)
    return float(np.max(np.abs(a - e) / np.abs(e)))


def draw_losses(records: Mapping[str, Record], path: Path, loss: str) -> None:
    """Draws training and validation losses against steps and against seconds of training."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_step, by_second = figure.subplots(1, 2)
    # Equal curves lie on each other: the first is drawn widest, so that it shows beneath.
    widths = np.linspace(5.0, 1.2, len(records))
    for index, ((name, record), width) in enumerate(zip(records.items(), widths, strict=True)):
        steps = np.arange(1, len(record.losses) + 1)
        seconds = np.cumsum(record.step_seconds)
        ends = np.asarray(record.epoch_ends) - 1
        smooth = smoothed(record.losses)
        for axes, x in ((by_step, steps), (by_second, seconds)):
            axes.plot(x, smooth, color=f"C{index}", linewidth=width, alpha=0.8, label=name)
            axes.plot(
                x[ends],
                record.validation_losses,
                "o",
                color=f"C{index}",
                markersize=4 + 2 * width,
                markerfacecolor="none",
                markeredgewidth=1.5,
            )
    by_step.plot([], [], "o", color="grey", markerfacecolor="none", label="validation")
    by_step.set(xlabel="step", ylabel=loss, title="Training loss against steps")
    by_second.set(xlabel="seconds of training", title="Training loss against time")
    for axes in (by_step, by_second):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    by_step.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def smoothed(losses: Sequence[float], decay: float = 0.97) -> NDArray[np.float64]:
    """Returns the exponential moving average, corrected for its start as Adam's moments are."""
    average, values = 0.0, np.empty(len(losses))
    for i, loss in enumerate(losses):
        average = decay * average + (1 - decay) * loss
        values[i] = average / (1 - decay ** (i + 1))
    return values

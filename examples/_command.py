"""The command line that the examples have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _contenders import STOCK
from _contest import CheckpointError, Contender, Contest, Recipe, Record, Trainee
from _corpus import DataError
from _report import draw_losses, parity_table, timing_table
from rich.console import Console


def make_parser(description: str | None, plot: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="a real run, less than half an hour")
    size.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--epochs", type=int, help="instead of the number that the size implies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=plot)
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.resume and not (options.checkpoint and options.checkpoint.is_file()):
        parser.error("--resume needs --checkpoint with an existing file")
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs must be >= 1, got {options.epochs}")
    return options


def settings_of(options: argparse.Namespace, default: Any, full: Any, smoke: Any) -> Any:
    """The settings of the size that was asked for, with its epochs and its seed."""
    settings = full if options.full else smoke if options.smoke else default
    recipe: Recipe = settings.recipe
    recipe = replace(recipe, seed=options.seed, epochs=options.epochs or recipe.epochs)
    return replace(settings, recipe=recipe)


def compete(
    contest: Contest,
    contenders: Sequence[Contender],
    options: argparse.Namespace,
    console: Console,
) -> tuple[dict[str, Trainee], dict[str, Record]]:
    """Trains all of them; prints how long they took, and whether they learnt the same."""
    trainees = contest.run(contenders, options.checkpoint, options.resume)
    records = {name: trainee.record for name, trainee in trainees.items()}
    console.print(timing_table(records, STOCK), parity_table(records))
    return trainees, records


def run_command(
    run: Callable[[argparse.Namespace, Console], Mapping[str, Record]],
    options: argparse.Namespace,
    loss: str = "cross-entropy",
    reports: bool = True,
) -> int:
    """Runs a program and draws what it recorded; what the user can mend ends it with status 2."""
    start = perf_counter()
    console = Console(quiet=not reports)
    if not console.is_terminal:
        console.width = 120  # a log file need not wrap the tables at 80 columns
    try:
        records = run(options, console)
    except (DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not reports:
        return 0
    draw_losses(records, options.plot, loss)
    console.print(f"plot: {options.plot}", soft_wrap=True)
    if options.checkpoint:
        console.print(f"checkpoint: {options.checkpoint}", soft_wrap=True)
    console.print(f"{perf_counter() - start:.0f} s in all, {torch.get_num_threads()} threads")
    return 0

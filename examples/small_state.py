"""The language model in fewer bytes: small moments, bf16 parameters, gradients freed at once.

    python examples/small_state.py                       # some minutes on two cores
    python examples/small_state.py --data *.txt          # your own files, UTF-8
    python examples/small_state.py --range-plot lr.png   # first, how large a learning rate may be

The same model learns the same batches five ways: with torch's AdamW; with fastopt's; with moments
of 8 bits; the same with each gradient used and freed inside the backward pass; and in bf16 with
parameters rounded by chance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import language_model
import torch
from _command import make_parser, parse, run_command, settings_of
from _contest import Contender, Contest, Record, Trainee, parameter_groups
from _library import hold_out, read_files, read_library
from _report import figures_table, parity_table, timing_table
from _tail import FusedTail
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from fastopt import optim

SMALL = {"state_storage": "8bit"}
SMALLEST = {"state_storage": "8bit", "param_precision": "stochastic"}


class ReleaseTail:
    """Nothing follows the backward pass: it has stepped each parameter and freed its gradient."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., optim.AdamW],
        max_grad_norm: float,
        ema_decay: float | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer(ema_decay=ema_decay)
        # By the norm of the step before: this one's is known when the last gradient is gone.
        self.release = optim.GradientRelease(self.optimizer, max_grad_norm=max_grad_norm)

    def step(self) -> None:
        pass

    @contextmanager
    def evaluated(self):
        yield self.model

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "release": self.release.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.release.load_state_dict(state["release"])


PARTS = language_model.FAST_PARTS
CONTENDERS = (
    Contender("torch", torch.optim.AdamW, part=PARTS),
    Contender("fastopt", optim.AdamW, tail=FusedTail, part=PARTS),
    Contender("8-bit moments", optim.AdamW, SMALL, FusedTail, PARTS),
    Contender("8-bit moments, released", optim.AdamW, SMALL, ReleaseTail, PARTS),
    Contender("bf16, 8-bit, released", optim.AdamW, SMALLEST, ReleaseTail, PARTS),
)


def contest_of(task: language_model.Task, settings: language_model.Settings) -> Contest:
    contest = language_model.contest_of(task, settings)

    def make_model(contender: Contender) -> nn.Module:
        in_bf16 = "param_precision" in contender.flags
        return contest.make_model(contender).to(torch.bfloat16 if in_bf16 else torch.float32)

    return replace(contest, make_model=make_model)


def bytes_of(tensors: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def memory_table(trainees: dict[str, Trainee]) -> Table:
    """What a parameter costs after training, and its gradient after a backward pass."""
    heads = "contender", "parameter", "state", "gradient", "in all", "validation loss"
    table = figures_table("Bytes per parameter", *heads)
    for name, trainee in trainees.items():
        parameters = list(trainee.model.parameters())
        state = [t for own in trainee.tail.optimizer.state.values() for t in own.values()]
        released = isinstance(trainee.tail, ReleaseTail)
        count = sum(parameter.numel() for parameter in parameters)
        own = bytes_of(parameters) / count
        costs = own, bytes_of(state) / count, 0.0 if released else own
        cells = [f"{cost:.2f}" for cost in (*costs, sum(costs))]
        table.add_row(name, *cells, f"{min(trainee.record.validation_losses):.4f}")
    return table


def draw_range(contest: Contest, path: Path) -> float:
    """Draws losses over learning rates; returns the rate where they fall fastest."""
    torch.manual_seed(contest.recipe.seed)
    model: Any = contest.make_model(CONTENDERS[1])
    optimizer = optim.AdamW(parameter_groups(model, contest.recipe.weight_decay))
    batches = iter(contest.batches_of(0))

    def step() -> float:
        optimizer.zero_grad()
        loss = model.loss(*next(batches))
        loss.backward()
        optimizer.step()
        return loss.item()

    steps = min(100, contest.steps_per_epoch)
    found = optim.lr_range_test(step, optimizer, start_lr=1e-5, end_lr=1.0, num_steps=steps)
    figure = Figure(figsize=(6, 4), layout="constrained")
    found.plot(figure.subplots())
    figure.savefig(path, dpi=120)
    return found.steepest


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/small_state.png"))
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="UTF-8, two or more")
    parser.add_argument("--range-plot", type=Path, metavar="PNG", help="of a learning-rate test")
    return parse(parser, arguments)


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    sizes = language_model.DEFAULT, language_model.FULL, language_model.SMOKE
    settings: language_model.Settings = settings_of(options, *sizes)
    documents = read_files(options.data) if options.data else read_library(settings.modules)
    library = hold_out(documents, options.seed)
    task = language_model.prepare(library, settings)
    console.print(language_model.data_table(library, task))

    contest = contest_of(task, settings)
    if options.range_plot:
        rate = draw_range(contest, options.range_plot)
        console.print(f"the loss falls fastest at a learning rate of {rate:.2g}: ", end="")
        console.print(f"{options.range_plot}", soft_wrap=True)
    trainees = contest.run(CONTENDERS, options.checkpoint, options.resume)
    records = {name: trainee.record for name, trainee in trainees.items()}
    console.print(timing_table(records, ("torch",)), memory_table(trainees))
    exact = {name: records[name] for name in ("torch", "fastopt")}
    console.print(parity_table(exact))
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())

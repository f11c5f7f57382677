"""The demo's training spread over processes: a step's time and the losses, stock's beside ours.

    python -m bench.distributed --output bench/results/x.json    # two minutes on two cores

Each contender is wrapped in ``DistributedDataParallel`` over gloo and takes its turn on the same
batches, a half of each for each of two processes with one thread. One process with stock, which
sees whole batches, says what the losses should be.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from bench import command, results
from bench.results import Distributed
from bench.training import example

RANKS = 2
STEPS, QUICK_STEPS = 60, 6
WARMUP = 2  # steps in which DDP arranges its buckets and plans are made
STOCK = ("stock", "stock, fused")
OURS = "fastopt"


class Trainee:
    """A contender with its loss, which may be that of all processes, and what follows backward."""

    def __init__(self, contender: Any, contest: Any) -> None:
        torch.manual_seed(contest.recipe.seed)
        model = contest.make_model(contender)
        self.loss = contest.processes.loss_of(model)
        optimizer = partial(
            contender.optimizer, model.parameters(), lr=contest.recipe.lr, **contender.flags
        )
        self.tail = contender.tail(model, optimizer, contest.recipe.max_grad_norm, None)

    def step(self, batch: Sequence[Tensor]) -> float:
        """A training step; returns the loss."""
        loss = self.loss(*batch)
        loss.backward()
        self.tail.step()
        return float(loss.item())


def _contest(steps: int, quick: bool, processes: Any) -> tuple[Any, list[Any], list[Any]]:
    """The demo without dropout, its contenders, and the part of its batches for this process."""
    program = example("classify_text")
    size = program.SMOKE if quick else program.DEFAULT
    settings = replace(size, dropout=0.0)
    parts = example("_corpus").split(program.load(None, settings).examples, settings.recipe.seed)
    task = program.prepare(parts, settings)
    contest = example("train_distributed").contest_of(task, settings, processes)
    contenders = [one for one in program.CONTENDERS if one.name in (*STOCK, OURS)]
    return contest, contenders, contest.batches_of(0)[:steps]


def _losses_of_one_process(steps: int, quick: bool) -> list[float]:
    alone = example("_contest").OneProcess()
    contest, contenders, batches = _contest(steps, quick, alone)
    stock = next(one for one in contenders if one.name == STOCK[0])
    trainee = Trainee(stock, contest)
    return [trainee.step(batch) for batch in batches]


def _of_rank(rank: int, folder: Path, steps: int, quick: bool) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    processes = example("_ranks").Ranks()
    contest, contenders, batches = _contest(steps, quick, processes)
    trainees = {one.name: Trainee(one, contest) for one in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    losses: dict[str, list[float]] = {name: [] for name in trainees}
    names = list(trainees)
    for turn, batch in enumerate(batches):
        first = turn % len(names)  # nobody always follows the same neighbour
        for name in names[first:] + names[:first]:
            dist.barrier()
            begin = time.perf_counter()
            loss = torch.tensor(trainees[name].step(batch), dtype=torch.float64)
            dist.barrier()
            seconds[name].append(time.perf_counter() - begin)
            losses[name].append(processes.mean(loss).item())
    if rank == 0:
        torch.save((seconds, losses), folder / "measured")
    dist.barrier()
    dist.destroy_process_group()


def measure(quick: bool = False) -> Distributed:
    """Trains all contenders in processes of their own, and stock in this one."""
    steps = QUICK_STEPS if quick else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn(_of_rank, (folder, steps, quick), nprocs=RANKS)
        seconds, losses = torch.load(folder / "measured")
    alone = _losses_of_one_process(steps, quick)
    contenders = {
        name: {
            "median": statistics.median(taken[WARMUP:]),
            "minimum": min(taken[WARMUP:]),
            "furthest_loss": max(
                abs(mine / other - 1) for mine, other in zip(losses[name], alone, strict=True)
            ),
        }
        for name, taken in seconds.items()
    }
    return {**results.provenance(), "steps": steps, "ranks": RANKS, "contenders": contenders}


def table(measured: Distributed) -> str:
    """A step's time, and how far losses are from those of one process."""
    contenders = measured["contenders"]
    ours = contenders[OURS]
    lines = [
        f"The demo's classifier under `DistributedDataParallel` on {measured['ranks']} processes "
        f"of one thread, {measured['steps']} steps in turns; losses against stock's on one "
        "process.",
        "",
        "| | a step, ms: median | minimum | over fastopt's: median | minimum | furthest loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, figures in contenders.items():
        ratios = [figures[of] / ours[of] for of in ("median", "minimum")]
        lines.append(
            f"| {name} | {figures['median'] * 1e3:.1f} | {figures['minimum'] * 1e3:.1f} | "
            f"{ratios[0]:.2f} | {ratios[1]:.2f} | {figures['furthest_loss']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = command.make_parser("distributed", __doc__, quick="the demo's smallest size")
    arguments = parser.parse_args()
    parts = {"distributed": (partial(measure, arguments.quick), table)}
    command.add(parts, arguments.output, parser)


if __name__ == "__main__":
    main()

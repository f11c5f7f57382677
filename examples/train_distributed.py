"""The demo's classifier, trained by the processes that torchrun starts, stock beside fastopt.

    torchrun --standalone --nproc-per-node=2 examples/train_distributed.py
    torchrun --standalone --nproc-per-node=2 examples/train_distributed.py --stock  # torch's alone
    python examples/train_distributed.py                     # the same losses from one process

Each process has its rows of every batch; gradients meet in DistributedDataParallel. The first one
reports and writes the checkpoint after each epoch. With torchrun --max-restarts=3, all go on from
there when one has died, with the losses that they would have had. Nothing is dropped out: masks
would hang on how batches are cut.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import classify_text
import torch.distributed as dist
from _command import compete, make_parser, parse, run_command, settings_of
from _contenders import CONTENDERS, STOCK
from _contest import Batch, Contest, OneProcess, Record
from _corpus import DataError, split
from _ranks import joined_group, restarts
from _report import corpus_table, quality_table
from rich.console import Console


def contest_of(
    task: classify_text.Task, settings: classify_text.Settings, processes: OneProcess
) -> Contest:
    """This process's part of the demo; batches are whole, so that all parts are equal.

    Raises:
        DataError: Batches cannot be cut in equal parts.
    """
    rank, count, size = processes.rank, processes.count, settings.batch_size
    if size % count:
        raise DataError(f"batches of {size} texts cannot be cut for {count} processes")
    whole = classify_text.contest_of(task, settings)

    def own_batches(epoch: int) -> list[Batch]:
        return [
            Batch(*(tensor.tensor_split(count)[rank] for tensor in batch))
            for batch in whole.batches_of(epoch)
            if len(batch.targets) == size
        ]

    return replace(
        whole,
        batches_of=own_batches,
        steps_per_epoch=len(task.train.texts) // size,
        validation=whole.validation[rank::count],
        processes=processes,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/train_distributed.png"))
    parser.set_defaults(checkpoint=Path("build/train_distributed.pt"))
    parser.add_argument("--stock", action="store_true", help="torch's optimizer and LSTM alone")
    return parse(parser, arguments)


def run(
    options: argparse.Namespace, console: Console, *, processes: OneProcess
) -> dict[str, Record]:
    settings = settings_of(options, classify_text.DEFAULT, classify_text.FULL, classify_text.SMOKE)
    settings = replace(settings, dropout=0.0)
    corpus = classify_text.load(None, settings)
    parts = split(corpus.examples, options.seed)
    console.print(corpus_table(corpus, parts))

    task = classify_text.prepare(parts, settings)
    contest = contest_of(task, settings, processes)
    names = STOCK if options.stock else (*STOCK, "fastopt")
    contenders = [contender for contender in CONTENDERS if contender.name in names]
    if restarts():
        options.resume = options.checkpoint.is_file()
    elif processes.is_first and not options.resume:
        options.checkpoint.unlink(missing_ok=True)  # a restart would take it for this run's
    trainees, records = compete(contest, contenders, options, console)

    answers = {n: classify_text.predicted_targets(t, task.test) for n, t in trainees.items()}
    console.print(quality_table(answers, task.test.targets.numpy(), records))

    return records


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    group = joined_group() if dist.is_torchelastic_launched() else nullcontext(OneProcess())
    with group as processes:
        return run_command(partial(run, processes=processes), options, reports=processes.is_first)


if __name__ == "__main__":
    sys.exit(main())

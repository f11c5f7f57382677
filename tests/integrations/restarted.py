"""Trains under torchrun, saves after each step, and dies once where it is told to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fastopt
from fastopt import optim
from training import classifier, data, loss_of

from _ranks import Ranks, joined_group, restarts  # isort: skip


def main(folder: Path) -> None:
    with joined_group() as group:
        train(folder, group)


def train(folder: Path, group: Ranks) -> None:
    model = classifier()
    fastopt.convert(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = optim.AdamW(parallel.parameters(), lr=0.02)
    checkpoint, step = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    inputs, classes = (tensor.tensor_split(group.count)[group.rank] for tensor in data())
    while step < 6:
        loss = loss_of(parallel, inputs, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        total = loss.detach().clone()
        dist.all_reduce(total)
        if group.is_first:
            with (folder / "losses").open("a") as file:
                file.write(f"{step} {total.item()!r}\n")
        if os.environ["DIES"] == "1" and step == 3 and not restarts():
            if not group.is_first:
                sys.exit(1)
            dist.barrier()  # in vain: this step is not saved
        if group.is_first:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "step": step}, folder / "new.pt")
            (folder / "new.pt").rename(checkpoint)
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

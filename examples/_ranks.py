"""Processes that torchrun starts to train one model, each on its rows of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from _contest import OneProcess
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class LossOf(nn.Module):
    """A model whose call is its loss: what DDP wraps has to be called, not a method of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model.loss(inputs, targets)
        return loss


class Ranks(OneProcess):
    """The processes of the group that this one has joined."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def loss_of(self, model: Any) -> Callable[..., Tensor]:
        """The parameters stay the model's own, so a checkpoint loads on any number of processes."""
        return DistributedDataParallel(LossOf(model))

    def mean(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total / self.count


@contextmanager
def joined_group() -> Iterator[Ranks]:
    """The group of this life: torchrun's store outlives it and has the addresses of the dead."""
    environment = os.environ
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(str(restarts()), store),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
    )
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has started these processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

"""What follows the backward pass, written with stock torch and with fastopt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastopt import optim


class Tail(Protocol):
    """Clips gradients, steps, averages parameters and drops the gradients."""

    optimizer: Optimizer

    def step(self) -> None: ...

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model with averaged parameters, if the recipe wants averages."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StockTail:
    """A pass over the parameters each to measure the norm, to clip, to step and to average."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        max_grad_norm: float,
        ema_decay: float | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer()
        self.max_grad_norm = max_grad_norm
        self.average = (
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
            if ema_decay is not None
            else None
        )

    def step(self) -> None:
        clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.optimizer.zero_grad()

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        yield self.average.module if self.average else self.model

    def state_dict(self) -> dict[str, Any]:
        average = self.average.state_dict() if self.average else None
        return {"optimizer": self.optimizer.state_dict(), "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])


class FusedTail:
    """One pass to measure the norm; the optimizer clips, steps and averages in another."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., optim.Adam],
        max_grad_norm: float,
        ema_decay: float | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer(max_grad_norm=max_grad_norm, ema_decay=ema_decay)

    def step(self) -> None:
        self.optimizer.step()
        # Not zero_grad_after_step: without a gradient to add to, backward hands over its own.
        self.optimizer.zero_grad()

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        if self.optimizer.ema_decay is None:
            yield self.model
        else:
            with self.optimizer.average_parameters():
                yield self.model

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

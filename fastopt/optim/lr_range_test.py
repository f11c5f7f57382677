"""The learning-rate range test (Smith 2017): how large a rate a model bears."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt.ops.arguments import check_optimizer, is_number


@dataclass(frozen=True)
class LrRange:
    """What a range test has found.

    Attributes:
        lrs: The learning rates that were tried, rising.
        losses: The loss of each.
        smoothed: The same as a moving average, its beginning corrected.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss fell fastest on its way to its lowest: a good choice.

        Raises:
            ValueError: Fewer than three rates were tried before the loss diverged.
        """
        if len(self.lrs) < 3:
            raise ValueError(f"a slope needs three losses, got {len(self.lrs)}")
        lowest = min(range(len(self.lrs)), key=self.smoothed.__getitem__)
        falls = [  # not where it only comes down from a peak that the rate has made
            self.smoothed[place - 1] - self.smoothed[place + 1]
            for place in range(1, max(2, min(lowest, len(self.lrs) - 2) + 1))
        ]
        return self.lrs[1 + max(range(len(falls)), key=falls.__getitem__)]

    def plot(self, axes: Any = None) -> Any:
        """Draws losses over rates, and a mark at the steepest.

        Args:
            axes: Of matplotlib; None makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed, and there are no axes.
        """
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots()[1]
        axes.plot(self.lrs, self.losses, color="#bbbbbb", linewidth=1, label="loss")
        axes.plot(self.lrs, self.smoothed, color="#2a78d6", label="smoothed")
        if len(self.lrs) >= 3:
            lr = self.steepest
            axes.axvline(lr, color="#c2453c", linestyle="--", label=f"steepest: {lr:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        return axes


def lr_range_test(
    step: Callable[[], float | Tensor],
    optimizer: Optimizer,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_steps: int = 100,
    smoothing: float = 0.9,
    diverged: float = 4.0,
) -> LrRange:
    """Trains with a learning rate that grows from step to step, and puts everything back.

    Parameters, their gradients and the optimizer's state and rates are as before afterwards;
    buffers of the model and the state of data loaders are not.

    Args:
        step: Takes the next batch, computes the loss, its gradients, steps the optimizer, and
            returns the loss.
        optimizer: What ``step`` steps; its rates are set for all groups alike.
        start_lr: The first rate.
        end_lr: The last one.
        num_steps: How many rates are tried, two at least, each a constant factor above the one
            before.
        smoothing: Weight of the past in the average that judges the loss, in [0, 1).
        diverged: The test ends where the smoothed loss is this many times the smallest, or not
            finite.

    Returns:
        The rates that were tried and their losses.

    Raises:
        TypeError: ``step`` cannot be called, or there is no optimizer.
        ValueError: A number is out of range, or none.
    """
    if not callable(step):
        raise TypeError(f"step must be something to call, got {step!r}")
    check_optimizer(optimizer)
    if not (is_number(end_lr) and 0 < end_lr < math.inf):
        raise ValueError(f"end_lr must be above 0 and finite, got {end_lr!r}")
    if not (is_number(start_lr) and 0 < start_lr < end_lr):
        raise ValueError(f"start_lr must be above 0 and below end_lr={end_lr}, got {start_lr!r}")
    if type(num_steps) is not int or num_steps < 2:
        raise ValueError(f"num_steps must be a whole number >= 2, got {num_steps!r}")
    if not (is_number(smoothing) and 0 <= smoothing < 1):
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing!r}")
    if not (is_number(diverged) and diverged > 1):
        raise ValueError(f"diverged must be above 1, got {diverged!r}")
    found = LrRange([], [], [])
    average = 0.0
    with _put_back(optimizer):
        for number in range(num_steps):
            lr = start_lr * (end_lr / start_lr) ** (number / (num_steps - 1))
            for group in optimizer.param_groups:
                group["lr"] = lr
            returned = step()
            loss = float(returned.detach() if isinstance(returned, Tensor) else returned)
            average = smoothing * average + (1 - smoothing) * loss
            smoothed = average / (1 - smoothing ** (number + 1))
            if not math.isfinite(smoothed):
                break
            found.lrs.append(lr)
            found.losses.append(loss)
            found.smoothed.append(smoothed)
            if number and smoothed > diverged * min(found.smoothed):
                break
    return found


@contextmanager
def _put_back(optimizer: Optimizer) -> Iterator[None]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = [param.detach().clone() for param in params]
    grads = [None if param.grad is None else param.grad.detach().clone() for param in params]
    state = copy.deepcopy(optimizer.state_dict())
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value, grad in zip(params, values, grads, strict=True):
                param.copy_(value)
                param.grad = grad
        optimizer.load_state_dict(state)

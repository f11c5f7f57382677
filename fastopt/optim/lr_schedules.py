"""Learning-rate schedules with a warm-up, as factories of torch's ``LambdaLR``.

Each returns a :class:`torch.optim.lr_scheduler.LambdaLR`, to be stepped after every step of the
optimizer. The schedule itself is a small object that the scheduler's ``state_dict`` contains: a run
that is resumed goes on with the schedule that it began with.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastopt.ops.arguments import is_number


@dataclass
class Schedule(abc.ABC):
    """What the learning rate is multiplied by at each step, counted from 0.

    It rises linearly during the warm-up, reaches 1 at its end, and then follows ``decayed``.

    Attributes:
        warmup_steps: How many steps the warm-up takes; the first of them has ``1 / warmup_steps``.
    """

    warmup_steps: int

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)

    def __call__(self, step: int) -> float:
        """The factor of a step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.decayed(step - self.warmup_steps)

    @abc.abstractmethod
    def decayed(self, step: int) -> float:
        """The factor of a step after the warm-up, counted from its end."""


@dataclass
class EndingSchedule(Schedule):
    """One that reaches ``final_factor`` at ``total_steps`` and stays there."""

    total_steps: int
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps("total_steps", self.total_steps)
        if self.total_steps < self.warmup_steps:
            raise ValueError(
                f"total_steps must be at least warmup_steps={self.warmup_steps}, got "
                f"{self.total_steps}"
            )
        if not (is_number(self.final_factor) and 0 <= self.final_factor <= 1):
            raise ValueError(f"final_factor must be in [0, 1], got {self.final_factor!r}")

    def decayed(self, step: int) -> float:
        """From 1 to ``final_factor``."""
        steps = self.total_steps - self.warmup_steps
        part = min(1.0, step / steps) if steps else 1.0
        return self.final_factor + (1 - self.final_factor) * self.shape(part)

    @abc.abstractmethod
    def shape(self, part: float) -> float:
        """From 1 to 0 while ``part`` goes from 0 to 1."""


class Cosine(EndingSchedule):
    """Half a period of a cosine (Loshchilov and Hutter 2017, without restarts)."""

    def shape(self, part: float) -> float:
        """From 1 to 0 while ``part`` goes from 0 to 1."""
        return (1 + math.cos(math.pi * part)) / 2


class Linear(EndingSchedule):
    """A straight line."""

    def shape(self, part: float) -> float:
        """From 1 to 0 while ``part`` goes from 0 to 1."""
        return 1 - part


@dataclass
class WarmupStableDecay(EndingSchedule):
    """1 until the last ``decay_steps``, then a straight line (Hu et al. 2024, "MiniCPM")."""

    decay_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps("decay_steps", self.decay_steps)
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps and decay_steps must fit into total_steps={self.total_steps}, got "
                f"{self.warmup_steps} and {self.decay_steps}"
            )

    def shape(self, part: float) -> float:
        """From 1 to 0 while ``part`` goes from 0 to 1."""
        if part >= 1:
            return 0.0
        steps = self.total_steps - self.warmup_steps
        return min(1.0, (1 - part) * steps / self.decay_steps) if self.decay_steps else 1.0


class InverseSquareRoot(Schedule):
    """Falls as one over the square root of the step (Vaswani et al. 2017), without an end."""

    def decayed(self, step: int) -> float:
        """The factor of a step after the warm-up, counted from its end."""
        reference = max(self.warmup_steps, 1)
        return math.sqrt(reference / (reference + step))


def _check_steps(name: str, steps: int) -> None:
    if type(steps) is not int or steps < 0:
        raise ValueError(f"{name} must be a whole number >= 0, got {steps!r}")


def warmup_cosine(
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int,
    final_factor: float = 0.0,
    *,
    last_epoch: int = -1,
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to ``final_factor`` of the learning rate.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup_steps: Steps of the warm-up.
        total_steps: The step from which on the rate is ``final_factor`` of its own.
        final_factor: In [0, 1].
        last_epoch: As in torch: the step before the one to begin with.

    Returns:
        The scheduler: step it after the optimizer.

    Raises:
        ValueError: A number is out of range, or none.
    """
    return LambdaLR(optimizer, Cosine(warmup_steps, total_steps, final_factor), last_epoch)


def warmup_linear(
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int,
    final_factor: float = 0.0,
    *,
    last_epoch: int = -1,
) -> LambdaLR:
    """Linear warm-up, then a straight line down to ``final_factor`` of the rate.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup_steps: Steps of the warm-up.
        total_steps: The step from which on the rate is ``final_factor`` of its own.
        final_factor: In [0, 1].
        last_epoch: As in torch: the step before the one to begin with.

    Returns:
        The scheduler: step it after the optimizer.

    Raises:
        ValueError: A number is out of range, or none.
    """
    return LambdaLR(optimizer, Linear(warmup_steps, total_steps, final_factor), last_epoch)


def warmup_stable_decay(
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int,
    final_factor: float = 0.0,
    *,
    last_epoch: int = -1,
) -> LambdaLR:
    """Linear warm-up, the full rate, and a straight line in the last ``decay_steps``.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup_steps: Steps of the warm-up.
        total_steps: The step from which on the rate is ``final_factor`` of its own.
        decay_steps: Steps of the line at the end, part of ``total_steps``.
        final_factor: In [0, 1].
        last_epoch: As in torch: the step before the one to begin with.

    Returns:
        The scheduler: step it after the optimizer.

    Raises:
        ValueError: A number is out of range, or none.
    """
    schedule = WarmupStableDecay(warmup_steps, total_steps, final_factor, decay_steps)
    return LambdaLR(optimizer, schedule, last_epoch)


def warmup_inverse_sqrt(
    optimizer: Optimizer, warmup_steps: int, *, last_epoch: int = -1
) -> LambdaLR:
    """Linear warm-up, then as one over the square root of the step, without an end.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup_steps: Steps of the warm-up.
        last_epoch: As in torch: the step before the one to begin with.

    Returns:
        The scheduler: step it after the optimizer.

    Raises:
        ValueError: A number is out of range, or none.
    """
    return LambdaLR(optimizer, InverseSquareRoot(warmup_steps), last_epoch)

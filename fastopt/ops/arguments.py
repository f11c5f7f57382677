"""What is asked of an argument before anything is computed with it."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.optim import Optimizer


def is_number(value: object) -> bool:
    """A real one, symbolic ones of the compiler among them; True and False are none."""
    numbers = (Real, torch.SymInt, torch.SymFloat)
    return isinstance(value, numbers) and not isinstance(value, bool)


def is_scalar(value: object) -> bool:
    """A number, or a tensor of one real element, which stands for one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return is_number(value)


def check_optimizer(optimizer: object) -> None:
    """Raises TypeError for what is no optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")

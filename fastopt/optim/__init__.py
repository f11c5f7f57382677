"""Optimizers: the names, arguments and state of ``torch.optim``, on fastopt's kernels."""

from torch.optim import Optimizer, lr_scheduler, swa_utils

from fastopt.optim import self_check  # noqa: F401  # registers itself
from fastopt.optim.adagrad import Adagrad
from fastopt.optim.adam import Adam
from fastopt.optim.adamax import Adamax
from fastopt.optim.adamw import AdamW
from fastopt.optim.from_torch import from_torch, to_torch
from fastopt.optim.fused_optimizer import Options
from fastopt.optim.gradient_release import GradientRelease
from fastopt.optim.lamb import LAMB
from fastopt.optim.lion import Lion
from fastopt.optim.lr_range_test import LrRange, lr_range_test
from fastopt.optim.lr_schedules import (
    warmup_cosine,
    warmup_inverse_sqrt,
    warmup_linear,
    warmup_stable_decay,
)
from fastopt.optim.muon import Muon
from fastopt.optim.nadam import NAdam
from fastopt.optim.radam import RAdam
from fastopt.optim.rmsprop import RMSprop
from fastopt.optim.schedule_free_adamw import ScheduleFreeAdamW
from fastopt.optim.sgd import SGD

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "GradientRelease",
    "Lion",
    "LrRange",
    "Muon",
    "NAdam",
    "Optimizer",
    "Options",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "from_torch",
    "lr_range_test",
    "lr_scheduler",
    "swa_utils",
    "to_torch",
    "warmup_cosine",
    "warmup_inverse_sqrt",
    "warmup_linear",
    "warmup_stable_decay",
]

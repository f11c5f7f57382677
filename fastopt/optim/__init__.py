"""Optimizers: the names, arguments and state of ``torch.optim``, on fastopt's kernels."""

from torch.optim import Optimizer, lr_scheduler, swa_utils

from fastopt.optim import self_check  # noqa: F401  # registers itself
from fastopt.optim.adam import Adam
from fastopt.optim.adamw import AdamW
from fastopt.optim.fused_optimizer import Options
from fastopt.optim.lion import Lion
from fastopt.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "Optimizer", "Options", "lr_scheduler", "swa_utils"]

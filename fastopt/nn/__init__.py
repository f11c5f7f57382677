"""The names and arguments of ``torch.nn``, on fastopt's kernels."""

from fastopt.nn import utils

__all__ = ["utils"]

"""The operators: checks, the choice of a backend, and one call to it."""

from fastopt.ops.explain import explain
from fastopt.ops.optimizer_step import optimizer_step

__all__ = ["explain", "optimizer_step"]

"""fastopt: drop-in optimizers and layers for PyTorch that run kernels of their own."""

from importlib.metadata import PackageNotFoundError, version

# Before the native module: its OpenMP has to be the copy that torch brings.
import torch  # noqa: F401

from fastopt import nn, optim
from fastopt.backends import use_backend
from fastopt.nn.convert import convert, revert
from fastopt.ops.explain import explain

try:
    __version__ = version("fastopt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "unknown"

__all__ = ["__version__", "convert", "explain", "nn", "optim", "revert", "use_backend"]

"""The implementations of the operators and the choice among them."""

from fastopt.backends.registry import use_backend

__all__ = ["use_backend"]

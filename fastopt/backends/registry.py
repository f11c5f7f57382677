"""Which backend runs: the user's choice, the order of ``auto``, and the reasons."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

from fastopt.backends.contract import (
    AttentionRequest,
    Backend,
    Kernels,
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
)
from fastopt.backends.cpu import CpuBackend
from fastopt.backends.cuda import CUDA
from fastopt.backends.reference import ReferenceBackend
from fastopt.backends.stock import TorchBackend

logger = logging.getLogger("fastopt")

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CpuBackend(), CUDA, TorchBackend(), ReferenceBackend())
}

# What "auto" tries, by the parameter's device. `reference` is chosen by name only.
AUTO_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")}
AUTO_ORDER_ELSEWHERE = ("torch",)

# Where torch's dispatcher finds the operators that are registered with it.
DISPATCH_KEYS = ("CPU", "CUDA")

Request = ParameterRequest | LstmRequest | AttentionRequest | LinearCrossEntropyRequest

_in_use: ContextVar[str | None] = ContextVar("fastopt_backend", default=None)
_logged: set[str] = set()


def check_name(name: str, argument: str = "backend") -> str:
    """Returns ``name``, which came by way of ``argument``.

    Raises:
        ValueError: No backend is called so.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {['auto', *BACKENDS]}, got {name!r}")
    return name


def kernels(name: str) -> Kernels:
    """The backend of a name, for operators that torch dispatches."""
    return cast(Kernels, BACKENDS[name])


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the operators of the block on the backend given.

    A ``backend=`` of the optimizer's constructor goes before, ``FASTOPT_BACKEND`` behind. ``auto``
    takes the fastest that can do the work; a backend named otherwise never falls back to another.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``torch`` (stock's own implementation) or ``reference``.

    Raises:
        ValueError: No backend is called so.
    """
    token = _in_use.set(check_name(name))
    try:
        yield
    finally:
        _in_use.reset(token)


def context_choice() -> str | None:
    """The innermost ``use_backend`` block's choice."""
    return _in_use.get()


def requested(own: str | None) -> str:
    """The backend that counts: an object's own, the block's, the environment's, or ``auto``."""
    named = own or _in_use.get()
    if named is None:
        named = check_name(os.environ.get("FASTOPT_BACKEND") or "auto", "FASTOPT_BACKEND")
    return named


def candidates(request: Request, choice: str) -> Iterator[tuple[Backend, str | None]]:
    """The backends that ``choice`` allows up to the one that takes the request, with reasons."""
    if choice != "auto":
        names: tuple[str, ...] = (choice,)
    else:
        names = AUTO_ORDER.get(request.device.type, AUTO_ORDER_ELSEWHERE)
    for name in names:
        reason = request.ask(BACKENDS[name])
        yield BACKENDS[name], reason
        if reason is None:
            return


def choose(request: Request, choice: str) -> Backend:
    """The first backend that takes the request.

    Raises:
        RuntimeError: None does; with the reason of each that was asked.
    """
    backend, refused = _first_that_takes(request, choice)
    if refused:
        log_fall_through(refused[-1], backend.name, request.task)
    return backend


def choose_silently(request: Request, choice: str) -> str:
    """As ``choose``, without a word in the log: the backend's name."""
    return _first_that_takes(request, choice)[0].name


def _first_that_takes(request: Request, choice: str) -> tuple[Backend, list[str]]:
    refused: list[str] = []
    for backend, reason in candidates(request, choice):
        if reason is None:
            return backend, refused
        refused.append(reason)
    raise RuntimeError(f"backend {choice!r} cannot {request.task}: {'; '.join(refused)}")


def log_fall_through(reason: str, backend: str, task: str) -> None:
    """Says once for each reason that a slower backend does the work."""
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("%s: backend %r is to %s (said once)", reason, backend, task)

"""Which backend runs: the user's choice, the order of ``auto``, and the reasons."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, cast

from fastopt.backends import selfcheck
from fastopt.backends.contract import (
    MATRIX_RULES,
    Backend,
    Kernels,
    ParameterRequest,
    Request,
)
from fastopt.backends.cpu import CpuBackend
from fastopt.backends.cuda import CUDA
from fastopt.backends.measured import fastest_measured
from fastopt.backends.reference import ReferenceBackend
from fastopt.backends.stock import TorchBackend
from fastopt.backends.triton.backend import TRITON

logger = logging.getLogger("fastopt")

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CpuBackend(), CUDA, TRITON, TorchBackend(), ReferenceBackend())
}

# What "auto" tries, by the parameter's device. `reference` is chosen by name only.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch"),
    "cuda": ("cuda", "triton", "torch"),
}
AUTO_ORDER_ELSEWHERE = ("torch",)

# Where torch's dispatcher finds the operators that are registered with it.
DISPATCH_KEYS = ("CPU", "CUDA")


class Choice(NamedTuple):
    """What was chosen for a request.

    Attributes:
        request: The work.
        requested: What the user asked for.
        backend: Who does it; None where the backend that was named cannot.
        reasons: For each backend that was asked before, why it does not.
    """

    request: Request
    requested: str
    backend: str | None
    reasons: dict[str, str]


_in_use: ContextVar[str | None] = ContextVar("fastopt_backend", default=None)
_watching: ContextVar[list[Choice] | None] = ContextVar("fastopt_choices", default=None)
_logged: set[str] = set()


def check_name(name: str, argument: str = "backend") -> str:
    """Returns ``name``, which came by way of ``argument``.

    Raises:
        ValueError: No backend is called so.
    """
    if name not in ("auto", *BACKENDS):
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
        name: ``auto``, ``cpu``, ``cuda``, ``triton``, ``torch`` (stock's own implementation) or
            ``reference``.

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


def answers(request: Request, choice: str) -> Choice:
    """Asks the backends that ``choice`` allows until one takes the request."""
    reasons: dict[str, str] = {}
    for name in _allowed(request, choice):
        reason = request.ask(BACKENDS[name])
        if reason is None:
            return Choice(request, choice, name, reasons)
        reasons[name] = reason
    return Choice(request, choice, None, reasons)


def _allowed(request: Request, choice: str) -> tuple[str, ...]:
    if choice != "auto":
        return (choice,)
    if isinstance(request, ParameterRequest) and request.rule in MATRIX_RULES:
        return ("torch",)
    order = AUTO_ORDER.get(request.device.type, AUTO_ORDER_ELSEWHERE)
    first = fastest_measured(request)
    if first is None:
        return order
    return first, *[name for name in order if name != first]


def choose(request: Request, choice: str) -> Backend:
    """The first backend that takes the request.

    Raises:
        RuntimeError: None does; with the reason of each that was asked.
    """
    chosen = answers(request, choice)
    watching = _watching.get()
    if watching is not None and not selfcheck.is_running():
        watching.append(chosen)
    name = _taken(chosen)
    # Where torch is asked first, ours are what it falls back to.
    refusals = [reason for backend, reason in chosen.reasons.items() if backend != "torch"]
    if refusals:
        log_fall_through(refusals[-1], name, request.task)
    return BACKENDS[name]


def choose_silently(request: Request, choice: str) -> str:
    """As ``choose``, without a word in the log: the backend's name."""
    return _taken(answers(request, choice))


def _taken(chosen: Choice) -> str:
    if chosen.backend is None:
        reasons = "; ".join(chosen.reasons.values())
        raise RuntimeError(f"backend {chosen.requested!r} cannot {chosen.request.task}: {reasons}")
    return chosen.backend


@contextmanager
def watched() -> Iterator[list[Choice]]:
    """Collects what ``choose`` finds inside the block."""
    choices: list[Choice] = []
    token = _watching.set(choices)
    try:
        yield choices
    finally:
        _watching.reset(token)


def log_fall_through(reason: str, backend: str, task: str) -> None:
    """Says once for each reason that a slower backend does the work."""
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("%s: backend %r is to %s (said once)", reason, backend, task)

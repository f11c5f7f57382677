"""Kernels of a card prove themselves on the user's own before anything is trained with them.

A family of kernels registers a check: small parity cases, odd sizes among them. With kernels that
are there it takes about a second; Triton has to compile its own first, for a minute or so. It runs
at the family's first use on a card, and its verdict is kept in the user's cache directory for the
same card, driver, torch and build. ``FASTOPT_SELFCHECK`` is ``on``, ``off``,
which trusts the kernels, or ``force``, which checks once in each process whatever is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from fastopt.backends.cuda_context import is_capturing

logger = logging.getLogger("fastopt")

SETTINGS = ("on", "off", "force")

# The case of a check that raised, for want of memory say: it proves nothing about the kernels.
BROKEN_OFF = "the check itself"


class Outcome(NamedTuple):
    """What became of a case; ``error`` is empty where it passed."""

    case: str
    error: str


class CheckedBackend(Protocol):
    """A backend whose kernels have to prove themselves."""

    name: str
    device: str

    @property
    def missing(self) -> str:
        """Why the backend cannot be used at all, or ""."""

    def identity(self, device: torch.device) -> dict[str, str]:
        """Whatever a verdict hangs on: card, driver, versions, the build."""


# A check gets the device, and the name of the backend to ask for.
Check = Callable[[torch.device, str], Iterator[Outcome]]

_checks: dict[str, Check] = {}
_verdicts: dict[str, list[Outcome]] = {}
_is_running: ContextVar[bool] = ContextVar("fastopt_selfcheck", default=False)


def register(family: str, check: Check) -> None:
    """Names the check of a family of kernels."""
    _checks[family] = check


def families() -> tuple[str, ...]:
    """The families that have a check."""
    return tuple(_checks)


def refusal(family: str, backend: CheckedBackend, device: torch.device) -> str | None:
    """Why a family's kernels are not to be used on a device, or None.

    Raises:
        ValueError: FASTOPT_SELFCHECK is none of its values.
    """
    setting = _setting()
    if setting == "off" or is_running():
        return None
    identity = backend.identity(device)
    key = _key(family, identity)
    if key not in _verdicts:
        kept = None if setting == "force" else _read(key)
        if kept is None:
            if is_capturing(device):
                return "the kernels' self-check cannot run inside a graph's capture"
            kept = run(family, backend, device)
            if not any(outcome.case == BROKEN_OFF for outcome in kept):
                _write(key, identity, kept)
        _verdicts[key] = kept
        _warn(family, identity, kept)
    failed = [outcome.case for outcome in _verdicts[key] if outcome.error]
    if failed:
        return f"the kernels failed their self-check on this card ({', '.join(failed)})"
    return None


def run(family: str, backend: CheckedBackend, device: torch.device) -> list[Outcome]:
    """Runs a family's check now. A case that raises has failed, for this process alone."""
    token = _is_running.set(True)
    outcomes: list[Outcome] = []
    try:
        # Whatever the user's code around the first use has set does not matter.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.autocast(device.type, enabled=False),
        ):
            for outcome in _checks[family](device, backend.name):
                outcomes.append(outcome)
    except Exception as error:
        outcomes.append(Outcome(BROKEN_OFF, f"{type(error).__name__}: {error}"))
    finally:
        _is_running.reset(token)
    return outcomes


def is_running() -> bool:
    """Whether what runs now is a check, at somebody's first use of a family."""
    return _is_running.get()


def forget() -> None:
    """Drops what this process knows, but for the cache directory."""
    _verdicts.clear()


def _setting() -> str:
    setting = os.environ.get("FASTOPT_SELFCHECK") or "on"
    if setting not in SETTINGS:
        raise ValueError(f"FASTOPT_SELFCHECK must be one of {list(SETTINGS)}, got {setting!r}")
    return setting


def _warn(family: str, identity: dict[str, str], outcomes: list[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        warnings.warn(
            f"fastopt's kernels for {family} failed their self-check on {identity['card']}, case "
            f"{failed[0].case!r}: {failed[0].error}. The next backend's are used instead. Please "
            "report the output of `python -m fastopt selfcheck`.",
            RuntimeWarning,
            stacklevel=2,
        )


def cache_directory() -> Path:
    """Where verdicts are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastopt" / "selfcheck"


def _key(family: str, identity: dict[str, str]) -> str:
    text = json.dumps([family, sorted(identity.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(key: str) -> list[Outcome] | None:
    """What is kept; None where that is nothing, or unreadable."""
    try:
        kept = json.loads((cache_directory() / f"{key}.json").read_text())
        outcomes = [Outcome(str(case), str(error)) for case, error in kept["outcomes"]]
        return outcomes or None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        logger.info("a kept verdict is of no use and made anew: %s", error)
        return None


def _write(key: str, identity: dict[str, str], outcomes: list[Outcome]) -> None:
    """Keeps a verdict; another process may be writing the same one."""
    try:
        folder = cache_directory()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump({"identity": identity, "outcomes": outcomes}, file, indent=1)
        os.replace(file.name, folder / f"{key}.json")
    except (OSError, RuntimeError) as error:
        logger.info("the verdict of a self-check cannot be kept: %s", error)

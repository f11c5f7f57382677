"""The card that the tests of CUDA kernels run on: a real one, or the host simulator.

FASTOPT_TEST_DEVICE=cuda asks for a real one, as ``make gpu`` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from fastopt.backends import registry
from fastopt.backends.cuda import CUDA, CudaBackend

DEVICE = "cuda" if os.environ.get("FASTOPT_TEST_DEVICE") == "cuda" else "cpu"
IS_SIMULATED = DEVICE == "cpu"


def backend() -> CudaBackend:
    """The backend ``cuda``, in front of the simulator where there is no card."""
    if not IS_SIMULATED:
        assert not CUDA.missing, CUDA.missing
        return CUDA
    from fastopt import _native_cuda_sim as simulator

    return CudaBackend(simulator, DEVICE)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBackend]:
    """Registers it under its name, trusted."""
    monkeypatch.setenv("FASTOPT_SELFCHECK", "off")
    there = backend()
    monkeypatch.setitem(registry.BACKENDS, "cuda", there)
    yield there


# The backends whose kernels are held to the same cases.
BACKENDS = ("cpu", "cuda") if IS_SIMULATED else ("cuda",)
# No attention kernel of a card has fp64.
CARD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backends_and_dtypes(dtypes: Sequence[torch.dtype]) -> Any:
    """Parametrises a test of attention over both."""
    pairs = [
        (name, dtype)
        for name in BACKENDS
        for dtype in dtypes
        if name == "cpu" or dtype in CARD_DTYPES
    ]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, ids=str)


def placed(value: Any, backend: str) -> Any:
    """A tensor, or what has some inside, where a backend takes it."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE if backend == "cuda" else "cpu")
    if isinstance(value, dict):
        return {name: placed(item, backend) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [placed(item, backend) for item in value]
    return value

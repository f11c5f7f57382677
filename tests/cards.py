"""The card that the tests of CUDA kernels run on: a real one, or the host simulator.

FASTOPT_TEST_DEVICE=cuda asks for a real one, as ``make gpu`` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

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

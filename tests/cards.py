"""The card that tests of a card's kernels run on: a real one, or one that the host plays.

The host simulator plays it for CUDA kernels, Triton's interpreter for Triton's.
FASTOPT_TEST_DEVICE=cuda asks for a real one, as ``make gpu`` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from fastopt.backends import registry
from fastopt.backends.contract import UpdateRule
from fastopt.backends.cuda import CUDA, CudaBackend
from fastopt.backends.triton.backend import TRITON, TritonBackend

DEVICE = "cuda" if os.environ.get("FASTOPT_TEST_DEVICE") == "cuda" else "cpu"
IS_SIMULATED = DEVICE == "cpu"


def backend() -> CudaBackend:
    """The backend ``cuda``, in front of the simulator where there is no card."""
    if not IS_SIMULATED:
        assert not CUDA.missing, CUDA.missing
        return CUDA
    from fastopt import _native_cuda_sim as simulator

    return CudaBackend(simulator, DEVICE)


def triton_backend() -> TritonBackend:
    """The backend ``triton``, in front of the interpreter where there is no card."""
    if not IS_SIMULATED:
        assert not TRITON.missing, TRITON.missing
        return TRITON
    assert os.environ["TRITON_INTERPRET"] == "1"
    import triton_interpreter

    triton_interpreter.hasten()
    return TritonBackend(DEVICE)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBackend]:
    """Registers both backends of a card under their names, trusted; returns that of CUDA."""
    monkeypatch.setenv("FASTOPT_SELFCHECK", "off")
    there = backend()
    monkeypatch.setitem(registry.BACKENDS, "cuda", there)
    monkeypatch.setitem(registry.BACKENDS, "triton", triton_backend())
    yield there


# The backends whose kernels are held to the same cases.
CARD_BACKENDS = ("cuda", "triton")
BACKENDS = ("cpu", *CARD_BACKENDS) if IS_SIMULATED else CARD_BACKENDS
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


def read_on_card(optimizer: Any, most: int | None = None) -> Any:
    """Has an optimizer hand its hyperparameters, or the first, to the kernels as tensors there."""
    update_rule = optimizer._update_rule

    def with_tensors(group: dict[str, Any]) -> UpdateRule:
        rule: UpdateRule = update_rule(group)
        decay, *numbers = (
            torch.tensor(number, dtype=torch.float64, device=DEVICE)
            for number in (rule.decay, *rule.hyperparameters[:most])
        )
        left = rule.hyperparameters[len(numbers) :]
        return rule._replace(decay=decay, hyperparameters=(*numbers, *left))

    optimizer._update_rule = with_tensors
    return optimizer


def over_cards(name: str, values: Sequence[Any], *, sample: int = 1) -> Any:
    """Parametrises a test over the backends of a card and an argument of the test.

    Of many values Triton gets a sample: its interpreter takes milliseconds for a program, and on a
    card it compiles for each size.
    """
    taken = {"cuda": values, "triton": values[::sample]}
    pairs = [(backend, value) for backend in CARD_BACKENDS for value in taken[backend]]
    return pytest.mark.parametrize(
        ("backend", name), pairs, ids=lambda value: getattr(value, "name", str(value))
    )


def not_interpreted(reason: str) -> list[Any]:
    """The backends of a card; Triton where a real card runs it."""
    skipped = pytest.mark.skipif(IS_SIMULATED, reason=reason)
    return ["cuda", pytest.param("triton", marks=skipped)]


def placed(value: Any, backend: str) -> Any:
    """A tensor, or what has some inside, where a backend takes it."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE if backend in CARD_BACKENDS else "cpu")
    if isinstance(value, dict):
        return {name: placed(item, backend) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [placed(item, backend) for item in value]
    return value

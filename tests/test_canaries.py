"""No kernel writes beside a tensor: whatever is allocated lies between bytes of a known pattern."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import linear_cross_entropy_cases as cross_entropy
import lstm_cases
import test_attention
from canaries import LAYOUTS, CanaryMemory, Frame
from cards import DEVICE, IS_SIMULATED, card, placed  # noqa: F401 (a fixture)
from cases import ALL, COUNTERS, DTYPES, StoredCase, random
from fastopt.nn import utils
from fastopt.nn.functional import attention
from test_card_state_storage import CASES as STORED
from test_card_state_storage import make
from test_lstm_parity import DROPPED, GRID, LAID_OUT, SHARP

# Triton's stores are masked, which its own tests compare; its interpreter takes too long for these.
BACKENDS = ("cpu", "cuda") if IS_SIMULATED else ("cuda",)
TAIL = {"max_grad_norm": 1.0, "zero_grad_after_step": True, "ema_decay": 0.8, "clip_value": 0.4}
REAL = DTYPES[:4]
SHAPE = (3, 2, 7, 17)  # a tile of the kernels, and a rest

pytestmark = pytest.mark.usefixtures("card")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[CanaryMemory]:
    torch.set_num_threads(2)
    yield CanaryMemory(monkeypatch)


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else DEVICE


def sampled(cases: Any, backend: str, every: int, of_card: int, first: int = 0) -> list[Any]:
    """One of so many cases, fewer where a card is played; other ones for another ``first``."""
    step = of_card if backend == "cuda" and IS_SIMULATED else every
    return list(cases)[first % step :: step]


@pytest.mark.parametrize("distance", [-1, 40])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_write_beside_a_tensor_is_seen(memory: CanaryMemory, distance: int, value: float) -> None:
    tensor = torch.zeros(5, 8)
    tensor.fill_(1)
    memory.check()
    tensor.as_strided((1,), (1,), tensor.storage_offset() + distance).fill_(value)
    with pytest.raises(AssertionError, match=f"4 bytes beside .* first at byte {4 * distance}:"):
        memory.check()


@pytest.mark.parametrize("layout", ["column slice", "every other"])
def test_a_write_between_the_elements_of_a_tensor_is_seen(
    memory: CanaryMemory, layout: str
) -> None:
    tensor = memory.place(torch.zeros(5, 8), layout)
    memory.check()
    row = tensor.stride(0)
    tensor.as_strided((1,), (1,), tensor.storage_offset() + row - 1).fill_(0)
    with pytest.raises(AssertionError, match=f"first at byte {4 * (row - 1)}:"):
        memory.check()


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64], ids=str)
def test_every_update_changes_the_pattern(dtype: torch.dtype) -> None:
    """A rule that ran on would be seen: neither of its operands is zero there, nor a NaN."""
    pattern = Frame((1,), (1,), dtype).tensor
    assert pattern.isfinite().all() and pattern.abs().item() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_optimizer_step(memory: CanaryMemory, backend: str, layout: str) -> None:
    """Parameters and gradients in one layout, state in another from the second step on."""
    others = itertools.cycle(LAYOUTS)
    generator = torch.Generator().manual_seed(0)
    rows = list(LAYOUTS).index(layout)  # each layout meets another dtype of a case
    dtypes = itertools.islice(itertools.cycle((*REAL, torch.complex64)), rows, None)
    for case, dtype in zip(sampled(ALL, backend, 1, 6, rows), dtypes, strict=False):
        memory.frames.clear()
        values = random(SHAPE, dtype, generator).to(device_of(backend))
        param = torch.nn.Parameter(memory.place(values, layout))
        optimizer = case.make([param], backend=backend, **TAIL)
        for step in range(3):
            values = random(SHAPE, dtype, generator).to(device_of(backend))
            param.grad = memory.place(values, layout)
            optimizer.step()
            memory.check()
            if step == 0:
                state = optimizer.state[param]
                for key, value in state.items():
                    assert key in COUNTERS or memory.holds(value), key
                    if value.dim():
                        state[key] = memory.place(value, next(others))


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_is_stored_otherwise(memory: CanaryMemory, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    case: StoredCase
    for case in sampled(STORED, backend, 1, 7):
        memory.frames.clear()
        params = []
        for shape, layout in itertools.product([(1, 1), (1, 257), (64, 65)], list(LAYOUTS)[:3]):
            values = torch.randn(shape, generator=generator).to(case.dtype)
            params.append(torch.nn.Parameter(memory.place(values.to(device_of(backend)), layout)))
        optimizer = make(case, params, backend)
        for _ in range(2):
            for param in params:
                values = torch.randn(param.shape, generator=generator).to(param)
                param.grad = memory.place(values, "transposed")
            optimizer.step()
            memory.check()


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64], ids=str)
def test_gradient_norm_and_clipping(memory: CanaryMemory, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for order in (2,) if dtype.is_complex else (2, 1, 0, 3, math.inf, -math.inf):
        memory.frames.clear()
        params = []
        for shape, layout in itertools.product([(1, 1, 1, 1), SHAPE], LAYOUTS):
            param = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
            param.grad = memory.place(random(shape, dtype, generator), layout)
            params.append(param)
        utils.clip_grad_norm_(params, 0.5, order)
        if not dtype.is_complex:
            utils.clip_grad_value_(params, 0.1)
        memory.check()


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lstm(memory: CanaryMemory, backend: str, dtype: torch.dtype) -> None:
    cases = [*GRID, *LAID_OUT, *DROPPED, *SHARP]
    for case in sampled(cases, backend, 4, 24, REAL.index(dtype)):
        memory.frames.clear()
        lstm, _ = case.pair(dtype, backend=backend, device=device_of(backend))
        sample = case.sample(dtype).to(device_of(backend))
        outputs = lstm_cases.forward(lstm, sample)
        memory.check()
        lstm_cases.weighted([outputs["output"], outputs["h_n"], outputs["c_n"]]).backward()
        memory.check()
        assert memory.frames
        with torch.no_grad():
            lstm_cases.forward(lstm, sample)
        memory.check()


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_passes(memory: CanaryMemory, backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda" and dtype is torch.float64:
        pytest.skip("no attention kernel of a card has fp64")
    first = REAL.index(dtype)
    for number, case in enumerate(sampled(test_attention.CASES.values(), backend, 1, 9, first)):
        memory.frames.clear()
        inputs, mask, gradient = test_attention.tensors(case, dtype)
        if (number + first) % 2:  # as modules have it, heads beside each other
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        found = test_attention.run_there(case, dtype, backend, (inputs, mask, gradient))
        memory.check()
        assert all(memory.holds(found[name]) for name in ("output", "gradient of q"))
        with torch.no_grad():
            given, allowed, options = placed((inputs, mask, case.options), backend)
            attention(*given, attn_mask=allowed, backend=backend, **options)
        memory.check()


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy(memory: CanaryMemory, backend: str, dtype: torch.dtype) -> None:
    for case in sampled(cross_entropy.CASES.values(), backend, 1, 3, REAL.index(dtype)):
        memory.frames.clear()
        given: dict[str, Tensor] = cross_entropy.problem(case, dtype)
        cross_entropy.run(case, dtype, backend, given)
        memory.check()
        assert memory.frames

"""Sums over whole parameters on a card: several chunks, any layout, tails, counters, orders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cards import CARD_BACKENDS, DEVICE, IS_SIMULATED, card  # noqa: F401
from cases import random
from fastopt import optim
from fastopt.ops import optimizer_step as operator
from tolerances import assert_matches

pytestmark = pytest.mark.usefixtures("card")

TAIL = {"max_grad_norm": 1.0, "zero_grad_after_step": True, "ema_decay": 0.8, "clip_value": 0.4}
Params = list[torch.nn.Parameter]


@pytest.fixture(params=CARD_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def parameters(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(random(shape, dtype, generator).to(DEVICE)) for shape in shapes]


def step_both(ours: Params, optimizer: Any, others: Params, reference: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for mine, other in zip(ours, others, strict=True):
        other.grad = random(tuple(mine.shape), mine.dtype, generator).to(DEVICE)
        mine.grad = other.grad.clone()
    optimizer.step()
    reference.step()


def assert_same(ours: Params, optimizer: Any, others: Params, reference: Any) -> None:
    for mine, other in zip(ours, others, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=mine.dtype)
        for key in ("exp_avg", "exp_avg_sq"):
            actual, expected = optimizer.state[mine][key], reference.state[other][key]
            assert_matches(actual, expected, op="optimizer", dtype=mine.dtype)


@pytest.mark.parametrize("options", [{"max_grad_norm": None}, TAIL], ids=["plain", "tail"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_chunks_are_added_up(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    ours = parameters(dtype, ((3, 3001), (5,), (4096,)))
    others = copy.deepcopy(ours)
    options = {"lr": 0.1, "eps": 1e-2, **options}
    optimizer = optim.LAMB(ours, backend=backend, **options)
    reference = optim.LAMB(others, backend="reference", **options)
    for seed in range(2):
        step_both(ours, optimizer, others, reference, seed)
    assert_same(ours, optimizer, others, reference)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned"])
def test_any_layout(backend: str, layout: str) -> None:
    (values,) = parameters(torch.float32, ((70, 61),))
    buffer = torch.full((70 * 70 + 1,), 7.0, device=DEVICE)
    if layout == "transposed":
        view = values.detach().t().contiguous().t()
    elif layout == "sliced":
        view = buffer[: 70 * 70].view(70, 70)[:, 5:66].copy_(values.detach())
    else:
        view = buffer[1 : 1 + 70 * 61].view(70, 61).copy_(values.detach())
    ours, others = [torch.nn.Parameter(view)], [values]
    optimizer = optim.LAMB(ours, lr=0.1, backend=backend)
    reference = optim.LAMB(others, lr=0.1, backend="reference")
    for seed in range(2):
        step_both(ours, optimizer, others, reference, seed)
    assert_same(ours, optimizer, others, reference)


def test_counters_verdict_and_learning_rate_on_the_device(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "stays_on_device", lambda optimizer, verdict: True)
    ours, others = (parameters(torch.float32, ((4100,), (7,))) for _ in range(2))
    lr = torch.tensor(0.1, device=DEVICE)
    optimizer = optim.LAMB(ours, lr, capturable=True, backend=backend)
    reference = optim.LAMB(others, 0.1, backend="reference")
    for step in range(4):
        skipped = step in (0, 2)
        optimizer.grad_scale = torch.tensor(1.0, device=DEVICE)
        optimizer.found_inf = torch.tensor(float(skipped), device=DEVICE)
        before = [param.detach().clone() for param in ours]
        for mine, other in zip(ours, others, strict=True):
            other.grad = torch.randn(other.shape).to(DEVICE)
            mine.grad = other.grad.clone()
        optimizer.step()
        if skipped:
            assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
        else:
            reference.step()
    assert optimizer.state[ours[0]]["step"] == 2
    assert optimizer.state[ours[0]]["step"].device == ours[0].device
    assert_same(ours, optimizer, others, reference)


def test_parameters_at_different_steps_and_shared_memory(backend: str) -> None:
    def make() -> Params:
        buffer = torch.linspace(1, 2, 64).to(DEVICE)
        views = [buffer[:40], buffer[20:]]
        return [torch.nn.Parameter(v) for v in (torch.ones(5, device=DEVICE), *views)]

    ours, others = make(), make()
    optimizer = optim.LAMB(ours, lr=0.1, max_grad_norm=None, backend=backend)
    cpu = "cpu" if IS_SIMULATED else "torch"
    reference = optim.LAMB(others, lr=0.1, max_grad_norm=None, backend=cpu)
    for step in range(3):
        for index, (mine, other) in enumerate(zip(ours, others, strict=True)):
            other.grad = None if step < index else torch.full_like(other, 1.0 + step)
            mine.grad = None if other.grad is None else other.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, others, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)


@pytest.mark.skipif(not IS_SIMULATED, reason="a card's order is its own")
def test_any_order_of_threads_and_blocks_gives_the_same_bits(card: Any) -> None:  # noqa: F811
    results = []
    for seed in range(4):
        card.native.set_seed(seed)
        params = parameters(torch.float32, ((9000,), (5,), (300, 3)))
        optimizer = optim.LAMB(params, lr=0.1, backend="cuda")
        generator = torch.Generator().manual_seed(1)
        for param in params:
            param.grad = random(tuple(param.shape), param.dtype, generator).to(DEVICE)
        optimizer.step()
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

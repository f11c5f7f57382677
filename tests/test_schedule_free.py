"""ScheduleFreeAdamW: the paper's algorithm, the package's numbers, and its two modes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import parameters, train
from fastopt import optim
from tolerances import assert_matches

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"betas": (0.7, 0.9), "warmup_steps": 3, "r": 0.5, "weight_lr_power": 1.0, "eps": 1e-3},
)


def small(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return parameters(dtype, shapes=((5,), (3, 700), ()))


def assert_same(left: list[torch.nn.Parameter], right: list[torch.nn.Parameter]) -> None:
    for mine, other in zip(left, right, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=mine.dtype)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_papers_algorithm(options: dict[str, Any], backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, dtype=torch.float64, generator=generator)
    param = torch.nn.Parameter(start.clone())
    optimizer = optim.ScheduleFreeAdamW([param], lr=0.1, backend=backend, **options)
    optimizer.train()
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    x, z, v = start.clone(), start.clone(), torch.zeros_like(start)
    weights: list[float] = []
    for t in range(1, 9):
        y = (1 - beta1) * z + beta1 * x
        assert_matches(param.detach(), y, op="optimizer", dtype=torch.float64)
        grad = torch.randn(40, dtype=torch.float64, generator=generator)
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad)
        lr = 0.1 * min(1.0, t / group["warmup_steps"]) if group["warmup_steps"] else 0.1
        v = beta2 * v + (1 - beta2) * grad**2
        z = z - lr * grad / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        z = z - lr * group["weight_decay"] * y
        weights.append(t ** group["r"] * lr ** group["weight_lr_power"])
        share = weights[-1] / sum(weights)
        x = (1 - share) * x + share * z
    assert_matches(optimizer.state[param]["z"], z, op="optimizer", dtype=torch.float64)
    assert_matches(optimizer.state[param]["exp_avg_sq"], v, op="optimizer", dtype=torch.float64)
    optimizer.eval()
    assert_matches(param.detach(), x, op="optimizer", dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_packages_optimizer(options: dict[str, Any]) -> None:
    package = pytest.importorskip("schedulefree")
    ours, theirs = small(), small()
    mine = optim.ScheduleFreeAdamW(ours, **options)
    other = package.AdamWScheduleFree(theirs, **options)
    assert mine.defaults == other.defaults
    for params, optimizer in ((ours, mine), (theirs, other)):
        for seed in range(3):
            optimizer.train()
            train(optimizer, params, steps=3, seed=seed)
            optimizer.eval()
    assert_same(ours, theirs)
    saved, expected = mine.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    for index, state in expected["state"].items():
        for key, value in state.items():
            tensor = saved["state"][index][key]
            assert_matches(tensor, value, op="optimizer", dtype=torch.float32)

    # Checkpoints move both ways.
    ours_there, theirs_here = copy.deepcopy(ours), copy.deepcopy(theirs)
    there, here = package.AdamWScheduleFree(ours_there), optim.ScheduleFreeAdamW(theirs_here)
    there.load_state_dict(saved)
    here.load_state_dict(expected)
    for params, optimizer in ((ours_there, there), (theirs_here, here)):
        optimizer.train()
        train(optimizer, params, steps=3, seed=9)
        optimizer.eval()
    assert_same(ours_there, theirs_here)


def test_modes() -> None:
    params = small()
    optimizer = optim.ScheduleFreeAdamW(params, backend="cpu")
    with pytest.raises(RuntimeError, match=r"step\(\) in eval mode"):
        optimizer.step()
    optimizer.train()
    train(optimizer, params, steps=4)
    before = [param.detach().clone() for param in params]
    optimizer.train()  # a second time changes nothing
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer.eval()
    assert not all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    called: list[int] = []
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step(lambda: called.append(1))
    assert not called and optimizer.param_groups[0]["k"] == 4
    optimizer.eval()
    optimizer.train()
    for param, old in zip(params, before, strict=True):
        assert_matches(param.detach(), old, op="optimizer", dtype=torch.float32)


def test_the_mode_is_in_the_checkpoint() -> None:
    params, truth = small(), small()
    optimizer = optim.ScheduleFreeAdamW(params)
    reference = optim.ScheduleFreeAdamW(truth)
    for either in (optimizer, reference):
        either.train()
    train(optimizer, params, steps=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = optim.ScheduleFreeAdamW(params)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    train(fresh, params, steps=3, seed=2)
    train(reference, truth, steps=3)
    train(reference, truth, steps=3, seed=2)
    assert_same(params, truth)


def test_a_skipped_step_counts_nothing() -> None:
    params = small()
    optimizer = optim.ScheduleFreeAdamW(params, warmup_steps=10)
    optimizer.train()
    train(optimizer, params, steps=1)
    before = copy.deepcopy(optimizer.param_groups[0])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    train(optimizer, params, steps=1)
    assert {**optimizer.param_groups[0], "params": 0} == {**before, "params": 0}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (0.0, 0.9)}, "Invalid beta parameter at index 0: 0.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ],
)
def test_errors_name_argument_and_value(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        optim.ScheduleFreeAdamW(small(), **options)


def test_a_learning_rate_of_zero_and_a_tensor() -> None:
    def run(lr: float | Tensor) -> list[torch.nn.Parameter]:
        params = small()
        optimizer = optim.ScheduleFreeAdamW(params, lr=lr)
        optimizer.train()
        train(optimizer, params, steps=2)
        return params

    assert_same(run(0.0), small())
    assert_same(run(torch.tensor([0.5])), run(0.5))

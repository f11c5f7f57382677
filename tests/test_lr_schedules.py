"""Learning-rate schedules, and the range test."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from fastopt import optim

matplotlib.use("Agg")

FACTORIES: dict[str, Any] = {
    "cosine": lambda o: optim.warmup_cosine(o, 4, 20, 0.1),
    "linear": lambda o: optim.warmup_linear(o, 4, 20, 0.1),
    "stable": lambda o: optim.warmup_stable_decay(o, 4, 20, 8, 0.1),
    "inverse square root": lambda o: optim.warmup_inverse_sqrt(o, 4),
}
EXPECTED: dict[str, Any] = {
    "cosine": lambda part: 0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2,
    "linear": lambda part: 0.1 + 0.9 * (1 - part),
    "stable": lambda part: 0.1 + 0.9 * min(1.0, 2 * (1 - part)),
}


def optimizer_of_one() -> Any:
    return optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=2.0)


def rates(scheduler: Any, optimizer: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", FACTORIES)
def test_rates_are_those_of_the_formula(name: str) -> None:
    optimizer = optimizer_of_one()
    scheduler = FACTORIES[name](optimizer)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    found = rates(scheduler, optimizer, 30)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 30):
        if name == "inverse square root":
            factor = math.sqrt(4 / step)
        else:
            factor = EXPECTED[name](min(1.0, (step - 4) / 16))
        assert found[step] == pytest.approx(2.0 * factor)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_resumed_run_keeps_the_schedule_that_it_began_with(name: str, tmp_path: Path) -> None:
    optimizer = optimizer_of_one()
    scheduler = FACTORIES[name](optimizer)
    rates(scheduler, optimizer, 7)
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    expected = rates(scheduler, optimizer, 20)
    other = optimizer_of_one()
    resumed = FACTORIES[name](other)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert rates(resumed, other, 20) == expected


def test_the_numbers_of_a_schedule_are_in_its_state() -> None:
    optimizer, other = optimizer_of_one(), optimizer_of_one()
    state = optim.warmup_linear(optimizer, 3, 50).state_dict()
    longer = optim.warmup_linear(other, 3, 500)
    longer.load_state_dict(state)
    assert longer.lr_lambdas[0].total_steps == 50


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda o: optim.warmup_cosine(o, -1, 5), "warmup_steps must be .* got -1"),
        (lambda o: optim.warmup_cosine(o, 6, 5), "total_steps must be at least warmup_steps=6"),
        (lambda o: optim.warmup_linear(o, 1, 5, 1.5), r"final_factor must be in \[0, 1\], got 1.5"),
        (lambda o: optim.warmup_stable_decay(o, 3, 5, 4), "must fit into total_steps=5, got 3"),
        (lambda o: optim.warmup_linear(o, 1, 5, "x"), r"final_factor must be in \[0, 1\], got 'x'"),
        (lambda o: optim.warmup_linear(o, 1, 5.0), "total_steps must be .* got 5.0"),
        (lambda o: optim.warmup_linear(o, True, 5), "warmup_steps must be .* got True"),
        (lambda o: optim.warmup_stable_decay(o, 1, 5, True), "decay_steps must be .* got True"),
        (lambda o: optim.warmup_inverse_sqrt(o, 2.5), "warmup_steps must be .* got 2.5"),
        (lambda o: optim.warmup_inverse_sqrt(o, False), "warmup_steps must be .* got False"),
    ],
)
def test_wrong_numbers_are_named(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(optimizer_of_one())


def test_no_warmup_and_nothing_after_it() -> None:
    optimizer = optimizer_of_one()
    assert rates(optim.warmup_cosine(optimizer, 0, 0, 0.5), optimizer, 2) == [1.0, 1.0]


def quadratic() -> tuple[torch.nn.Parameter, Any, Any]:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([param], lr=0.3, momentum=0.9)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return param, optimizer, step


def test_the_steepest_fall_is_not_that_from_a_peak() -> None:
    smoothed = [6.0, 5.8, 5.0, 4.9, 8.0, 6.0, 5.5]
    lrs = [10.0**-place for place in range(7, 0, -1)]
    assert optim.LrRange(lrs, smoothed, smoothed).steepest == lrs[1]
    rising = [1.0, 2.0, 3.0, 2.0]
    assert optim.LrRange(lrs[:4], rising, rising).steepest == lrs[1]


def test_the_range_test_finds_where_the_loss_falls_and_puts_everything_back() -> None:
    param, optimizer, step = quadratic()
    step()
    before = param.detach().clone(), copy.deepcopy(optimizer.state_dict()), param.grad.clone()
    found = optim.lr_range_test(step, optimizer, start_lr=1e-4, end_lr=100.0, num_steps=60)
    assert 1e-4 < found.steepest < 1.0
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) < 60  # it diverged
    assert found.lrs[0] == 1e-4 and found.lrs == sorted(found.lrs)
    assert torch.equal(param.detach(), before[0]) and torch.equal(param.grad, before[2])
    assert optimizer.param_groups[0]["lr"] == 0.3
    buffer = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, before[1]["state"][0]["momentum_buffer"])
    step()


@pytest.mark.filterwarnings("error")
def test_the_range_test_takes_a_loss_with_its_graph() -> None:
    param, optimizer, _ = quadratic()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        optimizer.step()
        return loss

    assert len(optim.lr_range_test(step, optimizer, num_steps=5).losses) > 2


def test_the_range_test_is_drawn(tmp_path: Path) -> None:
    _, optimizer, step = quadratic()
    axes = optim.lr_range_test(step, optimizer, num_steps=30).plot()
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "learning rate"
    axes.figure.savefig(tmp_path / "range.png")
    assert (tmp_path / "range.png").stat().st_size > 1000


def test_wrong_arguments_of_the_range_test() -> None:
    _, optimizer, step = quadratic()
    for options, text in (
        ({"start_lr": 0.0}, "start_lr must be above 0"),
        ({"start_lr": "x"}, "start_lr must be above 0 and below end_lr=10.0, got 'x'"),
        ({"end_lr": torch.inf}, "end_lr must be above 0 and finite, got inf"),
        ({"end_lr": "x"}, "end_lr must be above 0 and finite, got 'x'"),
        ({"num_steps": 1}, "num_steps must be a whole number >= 2, got 1"),
        ({"num_steps": 2.5}, "num_steps must be a whole number >= 2, got 2.5"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"smoothing": torch.nan}, r"smoothing must be in \[0, 1\), got nan"),
        ({"smoothing": None}, r"smoothing must be in \[0, 1\), got None"),
        ({"diverged": 1.0}, "diverged must be above 1, got 1.0"),
        ({"diverged": "x"}, "diverged must be above 1, got 'x'"),
    ):
        with pytest.raises(ValueError, match=text):
            optim.lr_range_test(step, optimizer, **options)
    with pytest.raises(ValueError, match="needs three losses, got 0"):
        _ = optim.LrRange([], [], []).steepest

"""Gradients that are released in the backward pass."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastopt import optim
from tolerances import assert_matches


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)
    )


def losses(net: torch.nn.Module, batches: int = 1) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        yield net(torch.randn(5, 7, generator=generator)).square().mean()


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_released_gradients_train_as_kept_ones(make: Any, accumulation_steps: int) -> None:
    ours, theirs = model(), model()
    optimizer, plain = make(ours.parameters(), lr=0.05), make(theirs.parameters(), lr=0.05)
    optim.GradientRelease(optimizer, accumulation_steps=accumulation_steps)
    schedules = [optim.warmup_linear(o, 2, 9) for o in (optimizer, plain)]
    pairs = zip(losses(ours, 9), losses(theirs, 9), strict=True)
    for number, (mine, other) in enumerate(pairs):
        mine.backward()
        other.backward()
        assert all(param.grad is None for param in ours.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if number % accumulation_steps == accumulation_steps - 1:
            plain.step()
            plain.zero_grad()
            for schedule in schedules:
                schedule.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)


def test_a_checkpoint_of_a_run_with_released_gradients() -> None:
    first, second = model(), model()
    optimizer = optim.AdamW(first.parameters(), lr=0.05)
    optim.GradientRelease(optimizer)
    for loss in losses(first, 3):
        loss.backward()
    other = optim.AdamW(second.parameters(), lr=0.05)
    optim.GradientRelease(other)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(other.state) == 6
    for net in (first, second):
        for loss in losses(net, 2):
            loss.backward()
    for mine, copied in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, copied)
    assert optimizer.state_dict()["state"][0]["step"] == 5


def test_clipping_is_by_the_norm_of_the_step_before() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([param], lr=1.0)
    release = optim.GradientRelease(optimizer, max_grad_norm=1.0)
    (param * 3).sum().backward()  # a norm of 6, which nobody knew of before
    assert torch.equal(param.detach(), torch.full((4,), -3.0))
    assert release.grad_norm == 6
    (param * 3).sum().backward()
    assert_matches(param.detach(), torch.full((4,), -3.5), op="optimizer", dtype=torch.float32)


def test_tied_and_frozen_parameters_and_an_end_of_it() -> None:
    net = model()
    net[2].weight.requires_grad_(False)
    net[1].tied = net[0].weight
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    release = optim.GradientRelease(optimizer)
    before = net[2].weight.clone()
    (next(losses(net)) + net[1].tied.sum()).backward()
    assert net[0].weight.grad is None and torch.equal(net[2].weight, before)
    release.remove()
    next(losses(net)).backward()
    assert net[0].weight.grad is not None


def test_wrong_arguments_of_the_release() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    for wrong in (0, 1.5, "2", True):
        with pytest.raises(ValueError, match=f"accumulation_steps must be .* got {wrong!r}"):
            optim.GradientRelease(optim.SGD(params), accumulation_steps=wrong)
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        optim.GradientRelease(torch.optim.LBFGS(params))
    with pytest.raises(ValueError, match="Invalid max_grad_norm value: -1"):
        optim.GradientRelease(optim.SGD(params), max_grad_norm=-1)
    with pytest.raises(ValueError, match="must be None: give it to GradientRelease"):
        optim.GradientRelease(optim.SGD(params, max_grad_norm=1.0))


class Fails(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise ArithmeticError("as it was told to")


def fail(early: torch.Tensor, late: torch.Tensor) -> ArithmeticError:
    """A backward pass that raises once ``late`` has its gradient."""
    with pytest.raises(ArithmeticError) as caught:
        (Fails.apply(early * 1).sum() + (late * 100).sum()).backward()
    return caught.value


def test_a_pass_that_raised_leaves_no_trace_in_the_next_ones() -> None:
    early, late = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = optim.SGD([early, late], lr=1.0)
    release = optim.GradientRelease(optimizer, accumulation_steps=3, max_grad_norm=1e9)
    (early.sum() + late.sum()).backward()
    _error = fail(early, late)  # who keeps the traceback keeps the frames
    for _ in range(3):
        assert release.grad_norm is None and late.tolist() == [0.0] * 4
        ((early + late) * 3).sum().backward()
    assert release.grad_norm is not None and release.grad_norm.square() == pytest.approx(81 * 8)
    assert torch.equal(late.detach(), torch.full((4,), -9.0))
    _error = fail(early, late)
    release.remove()
    assert late.grad is not None and early.grad is None


def test_the_norm_after_a_step_that_raised() -> None:
    early, late = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    release = optim.GradientRelease(optim.SGD([early, late]), max_grad_norm=1e9)
    for _ in range(2):
        _error = fail(early, late)
    (early.sum() + late.sum()).backward()
    assert release.grad_norm is not None and release.grad_norm.square() == pytest.approx(8)


def test_passes_are_counted_for_all_parameters_together() -> None:
    often, rarely = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = optim.SGD([often, rarely], lr=1.0)
    optim.GradientRelease(optimizer, accumulation_steps=2)
    for both, expected in [
        (True, (0.0, 0.0)),
        (False, (-2.0, -1.0)),
        (False, (-2.0, -1.0)),
        (True, (-4.0, -2.0)),
    ]:
        (often.sum() + rarely.sum() if both else often.sum()).backward()
        assert (often[0].item(), rarely[0].item()) == expected


def coded(params: Any) -> Any:
    options: Any = {"state_storage": "8bit", "param_precision": "stochastic", "min_8bit_size": 1}
    return optim.AdamW(params, lr=0.05, ema_decay=0.9, rounding_seed=3, **options)


def schedule_free(params: Any) -> Any:
    optimizer = optim.ScheduleFreeAdamW(params, lr=0.05, warmup_steps=3, ema_decay=0.9)
    optimizer.train()
    return optimizer


MAKERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda params: optim.AdamW(params, lr=0.05, ema_decay=0.9, clip_value=0.01),
    "LAMB": lambda params: optim.LAMB(params, lr=0.05, max_grad_norm=None),
    "8bit, stochastic": coded,
    "ScheduleFreeAdamW": schedule_free,
    "torch.optim.NAdam": lambda params: torch.optim.NAdam(params, lr=0.05),
}


def groups_of(net: Any) -> list[dict[str, Any]]:
    return [{"params": [*net[0].parameters()]}, {"params": [*net[2:].parameters()], "lr": 0.02}]


def train(net: Any, optimizer: Any, passes: int, change: Any, step_each_pass: bool) -> None:
    """Without a gradient of the first layer in every third step."""
    generator = torch.Generator().manual_seed(1)
    for number in range(7 * passes):
        if number == 3 * passes:
            change(optimizer)
        batch = torch.randn(5, 7, generator=generator).to(net[0].weight.dtype)
        hidden = net[0](batch)
        hidden = hidden.detach() if number // passes % 3 == 2 else hidden
        net[1:](hidden).square().mean().backward()
        if step_each_pass or number % passes == passes - 1:
            optimizer.step()
            optimizer.zero_grad()


def change_nothing(optimizer: Any) -> None:
    pass


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_released_steps_are_the_same_to_the_bit(name: str, accumulation_steps: int) -> None:
    assert_same_run(MAKERS[name], accumulation_steps, change_nothing)


def assert_same_run(make: Any, accumulation_steps: int, change: Any) -> None:
    dtype = torch.bfloat16 if make is coded else torch.float32
    ours, theirs = model().to(dtype), model().to(dtype)
    optimizer, plain = make(groups_of(ours)), make(groups_of(theirs))
    optim.GradientRelease(optimizer, accumulation_steps=accumulation_steps)
    train(ours, optimizer, accumulation_steps, change, step_each_pass=True)
    train(theirs, plain, accumulation_steps, change, step_each_pass=False)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        state, expected = optimizer.state[mine], plain.state[other]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert torch.equal(value, expected[key]), key
    for group, other_group in zip(optimizer.param_groups, plain.param_groups, strict=True):
        assert {**group, "params": 0} == {**other_group, "params": 0}


def set_options(**options: Any) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        for name, value in options.items():
            setattr(optimizer, name, value)

    return change


@pytest.mark.parametrize(
    "options",
    [
        {"clip_value": 1e-3},
        {"state_storage": "8bit", "min_8bit_size": 1, "rounding_seed": 5},
        {"ema_decay": 0.5},
        {"ema_decay": None},
        {"_backend": "reference"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_after_the_construction(options: dict[str, Any]) -> None:
    assert_same_run(MAKERS["AdamW"], 1, set_options(**options))


def test_clipping_that_is_switched_on_later_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([param], lr=1.0)
    optim.GradientRelease(optimizer)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="must be None: give it to GradientRelease"):
        param.sum().backward()
    optimizer.max_grad_norm = None
    param.sum().backward()
    assert param.tolist() == [0.0, 0.0]


def test_no_step_in_a_mode_of_evaluation() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.ScheduleFreeAdamW([param], ema_decay=0.5)
    optim.GradientRelease(optimizer)
    with pytest.raises(RuntimeError, match="needs train"):
        param.sum().backward()
    optimizer.train()
    param.sum().backward()
    with optimizer.average_parameters(), pytest.raises(RuntimeError, match="average_parameters"):
        param.sum().backward()
    assert optimizer.param_groups[0]["k"] == 1


def test_one_release_at_a_time() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    for make in (optim.SGD, torch.optim.SGD):
        optimizer = make([param], lr=1.0)
        release = optim.GradientRelease(optimizer)
        with pytest.raises(RuntimeError, match="has a GradientRelease already"):
            optim.GradientRelease(optimizer)
        other = optim.GradientRelease(optim.SGD([param]))
        with pytest.raises(RuntimeError, match="another hook took the gradient"):
            param.sum().backward()
        other.remove()
        release.remove()
        second = optim.GradientRelease(optimizer)
        release.remove()
        param.grad = None
        param.sum().backward()
        assert param.grad is None
        second.remove()
        param.sum().backward()
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param.detach(), before - 1)
        param.grad = None


def test_the_last_norm_survives_a_restart() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    release = optim.GradientRelease(optim.SGD([param], lr=1.0), max_grad_norm=1.0)
    assert release.state_dict() == {"grad_norm": None}
    (param * 3).sum().backward()
    saved = release.state_dict()
    release.remove()
    again = optim.GradientRelease(optim.SGD([param], lr=1.0), max_grad_norm=1.0)
    again.load_state_dict(saved)
    before = param.detach().clone()
    (param * 3).sum().backward()
    assert_matches(
        before - param.detach(), torch.full((4,), 0.5), op="optimizer", dtype=torch.float32
    )


def test_what_changes_in_groups_after_a_checkpoint_or_later() -> None:
    first, frozen, added = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = optim.SGD([first, frozen], lr=1.0)
    optim.GradientRelease(optimizer, accumulation_steps=2)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 2.0
    optimizer.add_param_group({"params": [added], "lr": 1.0})
    first.requires_grad_(False)
    frozen.requires_grad_(True)
    for _ in range(4):
        (frozen.sum() + added.sum()).backward()
        assert added.grad is None
    assert (first.tolist(), frozen.tolist(), added.tolist()) == ([0.0] * 2, [-8.0] * 2, [-4.0] * 2)


def checkpointed(nets: list[Any], use_reentrant: bool) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        hidden = torch.randn(5, 7, generator=generator, requires_grad=True)
        for net in nets:
            hidden = checkpoint(net, hidden, use_reentrant=use_reentrant)
        yield hidden.square().mean()


def test_parts_of_a_pass_do_not_count() -> None:
    nets = [[torch.nn.Linear(7, 7) for _ in range(3)] for _ in range(2)]
    for one, other in zip(*nets, strict=True):
        one.load_state_dict(other.state_dict())
    norms = []
    for some, use_reentrant in zip(nets, (True, False), strict=True):
        params = [param for net in some for param in net.parameters()]
        optimizer = optim.ScheduleFreeAdamW(params, lr=0.05)
        optimizer.train()
        release = optim.GradientRelease(optimizer, accumulation_steps=2, max_grad_norm=1.0)
        for loss in checkpointed(some, use_reentrant):
            loss.backward()
        assert optimizer.param_groups[0]["k"] == 2
        norms.append(release.grad_norm)
    assert norms[0] is not None and torch.equal(norms[0], norms[1])
    for one, other in zip(*nets, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_a_parameter_that_two_reentrant_parts_share_is_refused() -> None:
    net = torch.nn.Linear(7, 7)
    optimizer = optim.SGD(net.parameters())
    optim.GradientRelease(optimizer)
    with pytest.raises(RuntimeError, match="reentrant checkpoints share it"):
        next(checkpointed([net, net], True)).backward()


def test_a_closure_and_a_state_that_is_converted_afterwards() -> None:
    net = model()
    optimizer = optim.AdamW(net.parameters(), state_storage="8bit", min_8bit_size=1)
    release = optim.GradientRelease(optimizer)

    def closure() -> torch.Tensor:
        loss = next(losses(net))
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert all(state["step"] == 1 for state in optimizer.state.values())
    stock = optim.to_torch(optimizer)
    stock.step(closure)
    release.remove()
    stock.step(closure)
    assert all(state["step"] == 3 for state in stock.state.values())
    assert all(state["exp_avg"].dtype == torch.float32 for state in stock.state.values())


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW])
def test_a_dropped_optimizer_leaves_the_gradients_and_the_memory(make: Any) -> None:
    net = model()
    optimizer = make(net.parameters())
    optim.GradientRelease(optimizer)
    gc.collect()
    next(losses(net)).backward()
    state = optimizer.state[net[0].weight]["exp_avg"]
    assert net[0].weight.grad is None
    alive = [weakref.ref(item) for item in (optimizer, state)]
    del optimizer, state
    gc.collect()
    assert [item() for item in alive] == [None, None]
    next(losses(net)).backward()
    assert net[0].weight.grad is not None

"""The same numbers as stock and as the fp64 reference, for every rule, dtype and shape."""

from __future__ import annotations

import copy

import pytest
import torch

from cases import ALL, COUNTERS, DTYPES, WITH_STOCK, OptimizerCase, clones, parameters, train
from fastopt._native_cpu import instruction_set
from fastopt.backends.contract import LAYERWISE_RULES
from tolerances import assert_matches, assert_no_worse_than_stock

LOW_PRECISION = (torch.bfloat16, torch.float16)
IDS = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_matches_stock(case: OptimizerCase, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    stock = clones(ours)
    our_optimizer = case.make(ours, backend="cpu")
    stock_optimizer = case.make_stock(stock)
    train(our_optimizer, ours)
    train(stock_optimizer, stock)
    for mine, theirs in zip(ours, stock, strict=True):
        assert_matches(mine.detach(), theirs.detach(), op="optimizer", dtype=dtype)
        assert our_optimizer.state[mine].keys() == stock_optimizer.state[theirs].keys()
        for key, value in stock_optimizer.state[theirs].items():
            tensor = our_optimizer.state[mine][key]
            exact = torch.float32 if key in COUNTERS else dtype
            assert_matches(tensor, value, op="optimizer", dtype=exact)
            assert tensor.dtype == value.dtype and tensor.shape == value.shape


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("case", ALL, **IDS)
def test_matches_the_reference_for_one_step_of_a_long_run(
    case: OptimizerCase, dtype: torch.dtype
) -> None:
    ours = parameters(dtype)
    optimizer = case.make(ours, backend="cpu")
    train(optimizer, ours, steps=4)
    copied = copy.deepcopy({"params": ours, "optimizer": optimizer})
    reference = copied["optimizer"]
    reference._backend = "reference"
    train(optimizer, ours, steps=1)
    train(reference, copied["params"], steps=1)
    for mine, truth in zip(ours, copied["params"], strict=True):
        assert_matches(mine.detach(), truth.detach(), op="rounded once", dtype=dtype)
        for key, value in reference.state[truth].items():
            tensor = optimizer.state[mine][key]
            exact_dtype = value.dtype if key in COUNTERS else dtype
            assert_matches(tensor, value, op="rounded once", dtype=exact_dtype)


@pytest.mark.parametrize("dtype", LOW_PRECISION, **IDS)
@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_low_precision_is_no_worse_than_stock(case: OptimizerCase, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    stock = clones(ours)
    truth = [torch.nn.Parameter(param.detach().double()) for param in ours]
    train(case.make(ours, backend="cpu"), ours, seed=3)
    train(case.make_stock(stock), stock, seed=3)

    def rounded(grad: torch.Tensor) -> torch.Tensor:
        return grad.to(dtype).double()

    train(case.make_stock(truth), truth, seed=3, gradient=rounded)
    for mine, theirs, exact in zip(ours, stock, truth, strict=True):
        if mine.numel():
            assert_no_worse_than_stock(mine.detach(), theirs.detach(), exact.detach())


@pytest.mark.parametrize("case", ALL, **IDS)
def test_torch_backend_gives_the_same(case: OptimizerCase) -> None:
    ours = parameters(torch.float32)
    fallback = clones(ours)
    train(case.make(ours, backend="cpu"), ours)
    train(case.make(fallback, backend="torch"), fallback)
    for mine, theirs in zip(ours, fallback, strict=True):
        assert_matches(mine.detach(), theirs.detach(), op="optimizer", dtype=torch.float32)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_parts_step_as_the_whole_but_for_layerwise_rules(case: OptimizerCase) -> None:
    """Which is what a rank does with its part of a DTensor. Tiles of the loop stay the same."""
    (whole,) = parameters(torch.float32, shapes=((4, 512),))
    parts = [torch.nn.Parameter(rows.clone()) for rows in whole.detach().split((1, 3))]
    optimizers = [case.make(params, backend="cpu") for params in ([whole], parts)]
    for seed in range(1, 4):
        (gradient,) = parameters(torch.float32, seed, ((4, 512),))
        whole.grad = gradient.detach()
        for part, rows in zip(parts, whole.grad.split((1, 3)), strict=True):
            part.grad = rows.clone()
        for optimizer in optimizers:
            optimizer.step()
    (group,) = optimizers[0].param_groups
    is_layerwise = optimizers[0]._update_rule(group).name in LAYERWISE_RULES
    assert torch.equal(torch.cat(parts), whole) != is_layerwise


def test_classical_momentum_is_the_textbook_formula() -> None:
    lrs = [0.1, 0.1, 0.01, 0.05]
    grads = [torch.randn(9, dtype=torch.float64) for _ in lrs]
    for nesterov in (False, True):
        param = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))
        theta, velocity = param.detach().clone(), torch.zeros(9, dtype=torch.float64)
        case = OptimizerCase("classical", ALL[0].ours, None, {"lr": 0.1, "momentum": 0.9})
        optimizer = case.make([param], classical_momentum=True, nesterov=nesterov)
        for lr, grad in zip(lrs, grads, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            param.grad = grad.clone()
            optimizer.step()
            velocity = 0.9 * velocity + lr * grad
            theta = theta - (0.9 * velocity + lr * grad if nesterov else velocity)
            assert_matches(param.detach(), theta, op="optimizer", dtype=torch.float64)


def test_classical_momentum_differs_from_torchs_once_the_learning_rate_changes() -> None:
    (torch_form, classical) = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    case = OptimizerCase("momentum", ALL[0].ours, None, {"lr": 0.1, "momentum": 0.9})
    optimizers = [case.make([torch_form]), case.make([classical], classical_momentum=True)]
    for step in range(3):
        for param, optimizer in zip((torch_form, classical), optimizers, strict=True):
            param.grad = torch.ones(3)
            optimizer.param_groups[0]["lr"] = 0.1 if step < 2 else 0.0
            optimizer.step()
        if step == 1:
            assert_matches(torch_form.data, classical.data, op="optimizer", dtype=torch.float32)
    # Without a learning rate torch's form stands still and the classical one coasts.
    assert (classical < torch_form).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-42, 3e38])
@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_special_values_follow_stock(case: OptimizerCase, value: float) -> None:
    if case.options.get("centered") and value == 3e38 and instruction_set == "baseline":
        pytest.skip("the mean's square overflows where it is not fused with its difference")
    for place in ("gradient", "parameter"):
        start = torch.linspace(-1, 1, 40)
        if place == "parameter":
            start[::3] = value
        ours, stock = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizers = case.make([ours], backend="cpu"), case.make_stock([stock])
        for _ in range(2):
            grad = torch.linspace(-2, 1, 40)
            if place == "gradient":
                grad[::3] = value
            for param, optimizer in zip((ours, stock), optimizers, strict=True):
                param.grad = grad.clone()
                optimizer.step()
        assert_matches(ours.detach(), stock.detach(), op="optimizer", dtype=torch.float32)

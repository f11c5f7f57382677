"""LAMB: the paper's formula, its defaults, and sums that do not depend on threads."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from cases import clones, parameters, train
from fastopt import optim
from tolerances import assert_matches

BACKENDS = ("cpu", "torch", "reference")


def paper_step(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, **options: Any
) -> Tensor:
    """Algorithm 2 of the paper in double precision, with apex's options."""
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, **options}
    beta1, beta2 = options["betas"]
    decay = options["weight_decay"]
    if not options.get("adam_w_mode", True):
        grad = grad + decay * param
    own = 1 - beta1 if options.get("grad_averaging", True) else 1.0
    state["m"] = beta1 * state["m"] + own * grad
    state["v"] = beta2 * state["v"] + (1 - beta2) * grad * grad
    corrects = options.get("bias_correction", True)
    m = state["m"] / (1 - beta1**step) if corrects else state["m"]
    v = state["v"] / (1 - beta2**step) if corrects else state["v"]
    direction = m / (v.sqrt() + options["eps"])
    if options.get("adam_w_mode", True):
        direction = direction + decay * param
    trust = 1.0
    if (decay != 0 or options.get("use_nvlamb")) and param.norm() != 0 and direction.norm() != 0:
        trust = float(param.norm() / direction.norm())
    return param - options["lr"] * trust * direction


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adam_w_mode": False, "weight_decay": 0.1},
        {"grad_averaging": False, "betas": (0.8, 0.9)},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "use_nvlamb": True},
        {"bias_correction": False, "eps": 1e-3},
    ],
    ids=str,
)
def test_is_the_papers_formula(options: dict[str, Any], backend: str) -> None:
    shapes = ((3, 700), (5,), (1,), (0,))
    params = parameters(torch.float64, shapes=shapes)
    with torch.no_grad():
        params[1].zero_()  # without a norm the ratio is 1
    options = {"lr": 0.1, **options}
    optimizer = optim.LAMB(params, **options, max_grad_norm=None, backend=backend)
    expected = [param.detach().clone() for param in params]
    states = [{"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in params]
    for step in range(1, 4):
        for index, (param, values) in enumerate(
            zip(params, parameters(torch.float64, step, shapes), strict=True)
        ):
            param.grad = values.detach()
            expected[index] = paper_step(
                expected[index], param.grad, states[index], step, **options
            )
        optimizer.step()
    for param, value, state in zip(params, expected, states, strict=True):
        assert_matches(param.detach(), value, op="optimizer", dtype=torch.float64)
        ours = optimizer.state[param]
        assert list(ours) == ["step", "exp_avg", "exp_avg_sq"]
        assert_matches(ours["exp_avg"], state["m"], op="optimizer", dtype=torch.float64)
        assert_matches(ours["exp_avg_sq"], state["v"], op="optimizer", dtype=torch.float64)


def test_defaults_are_apexs() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(optim.LAMB).parameters.items()
    }
    apexs = {
        "lr": 1e-3,
        "bias_correction": True,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        "adam_w_mode": True,
        "grad_averaging": True,
        "max_grad_norm": 1.0,
        "use_nvlamb": False,
    }
    assert {name: defaults[name] for name in apexs} == apexs
    assert inspect.signature(optim.Lion).parameters["max_grad_norm"].default is None


def test_gradients_are_clipped_unless_told_otherwise() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    clipped, plain = optim.LAMB(params[:1]), optim.LAMB(params[1:], max_grad_norm=None)
    for param, optimizer in zip(params, (clipped, plain), strict=True):
        param.grad = torch.full((4,), 5.0)
        optimizer.step()
    assert_matches(params[0].grad.norm(), torch.tensor(1.0), op="grad_norm", dtype=torch.float32)
    assert (params[1].grad == 5).all() and plain.grad_norm is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    shapes = ((300, 1111), (70000,), (3,))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            params = parameters(dtype, shapes=shapes)
            train(optim.LAMB(params, lr=0.1, max_grad_norm=None, backend="cpu"), params, steps=3)
            results.append(params)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


def test_sums_do_not_overflow() -> None:
    param = torch.nn.Parameter(torch.full((1000,), 1e25))
    param.grad = torch.ones(1000)
    optim.LAMB([param], lr=0.5, weight_decay=1e-30, max_grad_norm=None, backend="cpu").step()
    half = torch.full((1000,), 5e24)
    assert_matches(param.detach() / 1e25, half / 1e25, op="optimizer", dtype=torch.float32)


def test_groups_with_and_without_a_ratio_and_what_shares_memory() -> None:
    storage = torch.linspace(1, 2, 60)
    truth = [torch.nn.Parameter(storage[:40].clone()), torch.nn.Parameter(torch.ones(7))]
    ours = [torch.nn.Parameter(storage[:40]), torch.nn.Parameter(torch.ones(7))]
    overlapping = torch.nn.Parameter(storage[30:])
    optimizers = [
        optim.LAMB([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}],
                   lr=0.1, max_grad_norm=None, backend=backend)
        for params, backend in ((ours, "cpu"), (truth, "reference"))
    ]  # fmt: skip
    optimizers[0].add_param_group({"params": [overlapping]})
    for optimizer, params in zip(optimizers, (ours, truth), strict=True):
        for param in params:
            param.grad = torch.linspace(-1, 1, param.numel())
        optimizer.step()
    for mine, other in zip(ours, truth, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)
    names = [optimizers[0]._update_rule(g).name for g in optimizers[0].param_groups]
    assert names == ["lamb", "lamb_without_trust", "lamb"]
    before = overlapping.detach().clone()
    overlapping.grad = torch.ones(30)
    ours[0].grad = torch.zeros(40)
    optimizers[0].step()
    assert (overlapping < before).all()


def test_a_step_that_is_skipped_leaves_what_adam_leaves() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.LAMB([param])
    param.grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    state = optimizer.state[param]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert (param == 1).all() and not any(tensor.any() for tensor in state.values())


def test_says_who_steps_and_stores_no_coded_state() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.LAMB([param])
    assert [p.backend for p in fastopt.explain(optimizer).parameters] == ["cpu"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'state_storage'"):
        optim.LAMB([param], state_storage="8bit")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": "a"}, "Invalid learning rate: 'a'"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"eps": None}, "Invalid epsilon value: None"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9,)}, r"betas must be two numbers, got \(0.9,\)"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, "b")}, "Invalid beta parameter at index 1: 'b'"),
        ({"weight_decay": "c"}, "Invalid weight_decay value: 'c'"),
    ],
    ids=str,
)
def test_hyperparameters_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        optim.LAMB([torch.nn.Parameter(torch.ones(1))], **options)


def test_compiled_step() -> None:
    params = parameters(torch.float32, shapes=((4, 6), (9,)))
    truth = clones(params)
    optimizers = optim.LAMB(params, lr=0.1), optim.LAMB(truth, lr=0.1)
    compiled = torch.compile(optimizers[0].step, backend="eager")
    for seed in range(2):
        for tensors in (params, truth):
            for param, values in zip(
                tensors, parameters(torch.float32, seed, ((4, 6), (9,))), strict=True
            ):
                param.grad = values.detach()
        compiled()
        optimizers[1].step()
    for param, other in zip(params, truth, strict=True):
        assert_matches(param.detach(), other.detach(), op="optimizer", dtype=torch.float32)

"""fastopt.optim.from_torch and to_torch: a run goes on, and its schedulers, scalers and hooks."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import fastopt
from cases import DTYPES, WITH_STOCK, OptimizerCase, clones, parameters, train
from fastopt import optim
from fastopt.optim.from_torch import FRONTS
from tolerances import assert_matches

IDS = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}
SHAPES = ((5,), (3, 4), (), (700,))


def small(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return parameters(dtype, shapes=SHAPES)


def assert_same_bits(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    """Of parameters and state."""
    for mine, other in zip(left.param_groups, right.param_groups, strict=True):
        for param, twin in zip(mine["params"], other["params"], strict=True):
            assert torch.equal(param, twin)
            assert list(left.state[param]) == list(right.state[twin])
            for key, value in left.state[param].items():
                assert torch.equal(value, right.state[twin][key]), key


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_goes_on_to_the_bit_as_ours_with_that_state(
    case: OptimizerCase, dtype: torch.dtype
) -> None:
    params = small(dtype)
    optimizer = case.make_stock(params)
    train(optimizer, params, steps=3)
    twins = clones(params)
    other = case.make(twins)
    for param, twin in zip(params, twins, strict=True):  # load_state_dict would cast some of it
        other.state[twin] = copy.deepcopy(optimizer.state[param])
    taken = optim.from_torch(optimizer)
    assert taken is optimizer and type(taken) is case.ours
    assert {row.backend for row in fastopt.explain(taken).parameters} == {"cpu"}
    for seed in (1, 2):
        train(taken, params, steps=2, seed=seed)
        train(other, twins, steps=2, seed=seed)
        assert_same_bits(taken, other)


@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_there_and_back(case: OptimizerCase) -> None:
    params, twins = small(), small()
    optimizer, stock = case.make_stock(params), case.make_stock(twins)
    untouched = case.make_stock(small())
    attributes, text, saved = vars(untouched).keys(), repr(untouched), untouched.state_dict()
    for seed, change in enumerate((optim.from_torch, optim.to_torch, optim.from_torch)):
        train(optimizer, params, steps=2, seed=seed)
        train(stock, twins, steps=2, seed=seed)
        change(optimizer)
    assert optim.to_torch(optimizer) is optimizer
    assert type(optimizer) is case.stock and vars(optimizer).keys() == attributes
    assert repr(optimizer) == text
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    for param, twin in zip(params, twins, strict=True):
        assert_matches(param.detach(), twin.detach(), op="optimizer", dtype=torch.float32)
        assert optimizer.state[param].keys() == stock.state[twin].keys()


def test_muon_goes_on_to_the_bit_and_back() -> None:
    params = parameters(torch.float32, shapes=((3, 4), (20, 20), (20, 20)))
    optimizer = torch.optim.Muon(params, lr=0.01)
    train(optimizer, params, steps=3)
    twins = clones(params)
    other = optim.Muon(twins, lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    taken = optim.from_torch(optimizer)
    assert taken is optimizer and type(taken) is optim.Muon
    train(taken, params, steps=2, seed=1)
    train(other, twins, steps=2, seed=1)
    assert_same_bits(taken, other)
    assert type(optim.to_torch(taken)) is torch.optim.Muon
    train(optimizer, params, steps=1)


def test_every_front_of_a_torch_optimizer_is_listed() -> None:
    twins = {cls for cls in vars(optim).values() if isinstance(cls, type)}
    twins = {cls for cls in twins if hasattr(cls, "_torch_lists")}
    assert set(FRONTS.values()) == twins
    for stock, front in FRONTS.items():
        assert issubclass(front, stock) and front.__name__ == stock.__name__


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_of_torchs_fused_goes_on(fused: bool) -> None:
    params = small()
    optimizer = torch.optim.AdamW(params, fused=fused, foreach=False)
    train(optimizer, params, steps=2)
    before = vars(optimizer).copy()
    optim.from_torch(optimizer)
    train(optimizer, params, steps=2)
    assert vars(optim.to_torch(optimizer)) == before
    train(optimizer, params, steps=2)


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.2, total_steps=20, cycle_momentum=False
    ),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [3],
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("stock", [cls for cls in FRONTS if cls is not torch.optim.Muon], **IDS)
def test_schedulers_go_on(stock: Any, name: str) -> None:
    """Most put a wrapper around the step of the class into the optimizer."""
    runs = []
    for taken in (True, False):
        params = small()
        optimizer = stock(params, lr=0.01, foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a scheduler that misses its optimizer's step
            for step in range(8):
                if taken and step == 3:
                    optim.from_torch(optimizer)
                if taken and step == 6:
                    optim.to_torch(optimizer)
                train(optimizer, params, steps=1, seed=step)
                if taken:
                    ours = 3 <= step < 6
                    assert (getattr(optimizer, "_plan", None) is not None) == ours
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        runs.append((params, optimizer.param_groups[0]["lr"]))
    assert runs[0][1] == runs[1][1] != 0.01
    for param, twin in zip(runs[0][0], runs[1][0], strict=True):
        assert_matches(param.detach(), twin.detach(), op="optimizer", dtype=torch.float32)


def test_a_scheduler_notices_a_step_that_did_not_come() -> None:
    optimizer = torch.optim.SGD(small(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    optim.from_torch(optimizer)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_a_gradient_scaler_goes_on() -> None:
    runs = []
    for taken in (True, False):
        params = small()
        optimizer = torch.optim.AdamW(params, lr=0.01, foreach=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        for step in range(6):
            if taken and step == 3:
                optim.from_torch(optimizer)
            optimizer.zero_grad()
            loss = sum((param * (step + 1)).sin().sum() for param in params)
            scaler.scale(loss).backward()
            if step == 4:
                params[0].grad.fill_(torch.inf)  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
        runs.append((params, scaler.get_scale()))
    assert runs[0][1] == runs[1][1]
    for param, twin in zip(runs[0][0], runs[1][0], strict=True):
        assert_matches(param.detach(), twin.detach(), op="optimizer", dtype=torch.float32)


def test_hooks_go_on() -> None:
    params = small()
    optimizer = torch.optim.SGD(params, lr=0.1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optim.from_torch(optimizer)
    train(optimizer, params, steps=1)
    optimizer.state_dict()
    assert seen == ["before", "after", "saved"]


def test_groups_may_be_added_and_copies_go_on() -> None:
    params, more = small(), small()
    optimizer: Any = torch.optim.Adam(params, lr=0.1)
    train(optimizer, params, steps=1)
    optim.from_torch(optimizer)
    optimizer.add_param_group({"params": more, "lr": 0.2})
    train(optimizer, params + more, steps=2)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is optim.Adam
        assert_same_bits(copied, optimizer)
        assert type(optim.to_torch(copied)) is torch.optim.Adam


def test_options() -> None:
    params, twins = small(), small()
    optimizer = torch.optim.AdamW(params, lr=0.1)
    train(optimizer, params, steps=1)
    twin = optim.AdamW(twins, lr=0.1)
    train(twin, twins, steps=1)
    options: optim.Options = {"max_grad_norm": 0.5, "ema_decay": 0.9, "zero_grad_after_step": True}
    for either in (optim.from_torch(optimizer, **options), optim.from_torch(twin, **options)):
        assert either.max_grad_norm == 0.5 and either.ema_decay == 0.9
    for _ in range(2):
        train(optimizer, params, steps=1)
        train(twin, twins, steps=1)
    assert torch.equal(optimizer.grad_norm, twin.grad_norm)  # type: ignore[attr-defined]
    assert optim.from_torch(optimizer, clip_value=0.1).max_grad_norm == 0.5  # type: ignore[attr-defined]
    optim.to_torch(optimizer)  # type: ignore[arg-type]
    assert not hasattr(optimizer, "max_grad_norm") and not hasattr(optimizer, "grad_norm")
    train(optimizer, params, steps=1)


@pytest.mark.parametrize("storage", ["8bit", "bf16"])
def test_stored_moments_come_from_torchs_and_go_back(storage: str) -> None:
    params, twins = ([torch.nn.Parameter(p) for p in small()] for _ in range(2))
    optimizer, stock = (torch.optim.Adam(p, lr=0.01) for p in (params, twins))
    train(optimizer, params, steps=2)
    train(stock, twins, steps=2)
    optim.from_torch(optimizer, state_storage=storage, min_8bit_size=0)
    train(optimizer, params, steps=2, seed=1)
    train(stock, twins, steps=2, seed=1)
    assert optimizer.state[params[1]]["exp_avg"].dtype is not torch.float32
    optim.to_torch(optimizer)  # type: ignore[arg-type]
    for param, twin in zip(params, twins, strict=True):
        assert optimizer.state[param].keys() == stock.state[twin].keys()
        assert optimizer.state[param]["exp_avg"].dtype is torch.float32
    train(optimizer, params, steps=2, seed=2)
    train(stock, twins, steps=2, seed=2)
    for param, twin in zip(params, twins, strict=True):
        assert_matches(param.detach(), twin.detach(), op="changed storage", dtype=torch.float32)


class Own(torch.optim.AdamW):
    """Somebody's class."""


def test_what_is_not_taken_is_named_and_stays_as_it_is() -> None:
    params = small()
    for optimizer in (Own(params), torch.optim.Adadelta(params), torch.optim.Rprop(params)):
        before = type(optimizer)
        with pytest.raises(TypeError, match=rf"got \S+\.{before.__name__}$"):
            optim.from_torch(optimizer)
        assert type(optimizer) is before
    adam = torch.optim.Adam(params)
    attributes = vars(adam).copy()
    with pytest.raises(ValueError, match="Invalid clip_value value: -1"):
        optim.from_torch(adam, clip_value=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        optim.from_torch(adam, wrong=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'state_storage'"):
        optim.from_torch(torch.optim.NAdam(params), state_storage="8bit")
    assert type(adam) is torch.optim.Adam and vars(adam) == attributes
    adam.step = lambda: None  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"the step of this torch\.optim\.adam\.Adam was replaced"):
        optim.from_torch(adam)


def test_what_torch_has_not_got_stays_ours() -> None:
    params = small()
    with pytest.raises(TypeError, match=r"torch\.optim has no twin of fastopt\.optim\.lion\.Lion"):
        optim.to_torch(optim.Lion(params))
    with pytest.raises(TypeError, match=r"torch\.optim\.adam\.Adam is torch's own"):
        optim.to_torch(torch.optim.Adam(params))  # type: ignore[arg-type]
    classical = optim.SGD(params, momentum=0.9, classical_momentum=True)
    with pytest.raises(ValueError, match="has no classical_momentum"):
        optim.to_torch(classical)
    averaged = optim.SGD(params, ema_decay=0.9)
    with averaged.average_parameters(), pytest.raises(RuntimeError, match=r"to_torch\(\) inside"):
        optim.to_torch(averaged)


def test_no_cycle_keeps_a_taken_optimizer_alive() -> None:
    params = small()
    optimizer: Any = torch.optim.Adam(params)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    optim.from_torch(optimizer)
    train(optimizer, params, steps=1)
    gc.disable()
    try:
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_a_compiled_step_is_compiled_anew() -> None:
    params, twins = small(), small()
    optimizer, twin = torch.optim.SGD(params, lr=0.1), torch.optim.SGD(twins, lr=0.1)

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    gradients: list[Tensor] = [torch.randn(param.shape) for param in params]
    for number in range(4):
        if number == 2:
            optim.from_torch(optimizer, zero_grad_after_step=True)
        for param, other, gradient in zip(params, twins, gradients, strict=True):
            param.grad, other.grad = gradient.clone(), gradient.clone()
        step()
        twin.step()
    assert all((param.grad == 0).all() for param in params)
    for param, other in zip(params, twins, strict=True):
        assert_matches(param.detach(), other.detach(), op="optimizer", dtype=torch.float32)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {"state_storage": "8bit", "min_8bit_size": 0}),
     (torch.bfloat16, {"state_storage": "bf16", "param_precision": "master"})],
    ids=["8bit", "master"],
)  # fmt: skip
def test_coded_state_of_a_spread_parameter_becomes_torchs(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """One process is enough: a ``DTensor`` has none of the views that decoding takes of a part."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values, gradient = torch.randn(2, 40, 50).to(dtype)
        found = []
        for spread in (torch.Tensor.clone, partial(distribute_tensor, device_mesh=mesh)):
            param = torch.nn.Parameter(spread(values))
            optimizer = optim.AdamW([param], **options)
            param.grad = spread(gradient)
            optimizer.step()
            stock = optim.to_torch(optimizer)
            param.grad = spread(gradient)
            stock.step()
            found.append([param.detach(), *stock.state[param].values()])
        for plain, there in zip(*found, strict=True):
            whole = there.full_tensor() if isinstance(there, DTensor) else there
            assert torch.equal(plain, whole)
    finally:
        distributed.destroy_process_group()

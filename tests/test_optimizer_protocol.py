"""What a training loop expects of a torch optimizer: hooks, scalers, checkpoints, schedulers."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fastopt
from cases import ALL, WITH_STOCK, OptimizerCase, clones, parameters, train
from fastopt import optim
from tolerances import assert_matches

IDS = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}
TWINS = [
    (optim.SGD, torch.optim.SGD),
    (optim.Adagrad, torch.optim.Adagrad),
    (optim.Adam, torch.optim.Adam),
    (optim.AdamW, torch.optim.AdamW),
    (optim.Adamax, torch.optim.Adamax),
    (optim.NAdam, torch.optim.NAdam),
    (optim.RAdam, torch.optim.RAdam),
    (optim.RMSprop, torch.optim.RMSprop),
]


def small(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return parameters(dtype, shapes=((5,), (3, 4), ()))


def assert_same_params(ours: Any, theirs: Any, dtype: torch.dtype = torch.float32) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=dtype)


@pytest.mark.parametrize(("ours", "stock"), TWINS)
def test_signature_is_torchs_and_a_little_more(ours: type, stock: type) -> None:
    theirs = inspect.signature(stock).parameters
    mine = inspect.signature(ours).parameters
    assert [name for name in mine if name in theirs] == list(theirs)
    for name, parameter in theirs.items():
        assert mine[name].default == parameter.default and mine[name].kind == parameter.kind
    extra = [mine[name] for name in mine if name not in theirs]
    harmless = (None, False, 2.0, 4096)  # 4096 counts where moments are asked for in 8 bits
    assert all(p.kind is p.KEYWORD_ONLY and p.default in harmless for p in extra)
    assert {"max_grad_norm", "zero_grad_after_step", "ema_decay", "backend"} <= set(mine)
    assert issubclass(ours, stock)


@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_repr_defaults_and_state_dict_are_torchs(case: OptimizerCase) -> None:
    ours, stock = small(), small()
    mine, theirs = case.make(ours), case.stock(stock, **case.options)
    assert repr(mine) == repr(theirs)
    assert mine.defaults == theirs.defaults
    train(mine, ours)
    train(theirs, stock)
    my_dict, their_dict = mine.state_dict(), theirs.state_dict()
    assert my_dict["param_groups"] == their_dict["param_groups"]
    assert my_dict["state"].keys() == their_dict["state"].keys()
    for index, state in their_dict["state"].items():
        assert list(my_dict["state"][index]) == list(state)


@pytest.mark.parametrize("direction", ["to torch", "from torch", "both ways"])
@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_checkpoints_move_in_the_middle_of_a_run(case: OptimizerCase, direction: str) -> None:
    params, truth = small(), small()
    train(case.make_stock(truth), truth, steps=9)

    makers = {
        "to torch": [case.make, case.make_stock, case.make_stock],
        "from torch": [case.make_stock, case.make_stock, case.make],
        "both ways": [case.make, case.make_stock, case.make],
    }[direction]
    generator_steps = _gradient_script(9)
    checkpoint = None
    for index, make in enumerate(makers):
        optimizer = make(params)
        if checkpoint is not None:
            checkpoint.seek(0)
            optimizer.load_state_dict(torch.load(checkpoint, weights_only=True))
        for grads in generator_steps[3 * index : 3 * index + 3]:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
        checkpoint = io.BytesIO()
        torch.save(optimizer.state_dict(), checkpoint)
    assert_same_params(params, truth)


def _gradient_script(steps: int) -> list[list[Tensor | None]]:
    """The gradients that train() gives, written down."""
    script: list[list[Tensor | None]] = []
    params = small()

    class Recorder:
        def step(self) -> None:
            script.append([p.grad for p in params])

    train(Recorder(), params, steps=steps)  # type: ignore[arg-type]
    return script


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("case", ALL, **IDS)
def test_deepcopy_and_pickle_go_on_training(case: OptimizerCase, copier: Any) -> None:
    params = small()
    optimizer = case.make(params, backend="cpu")
    train(optimizer, params, steps=2)
    bundle = copier({"params": params, "optimizer": optimizer})
    copied = bundle["optimizer"]
    assert copied._backend == "cpu"
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(copied) if not name.startswith("_")}
    train(optimizer, params, steps=3, seed=5)
    train(copied, bundle["params"], steps=3, seed=5)
    for mine, other in zip(params, bundle["params"], strict=True):
        assert mine.data_ptr() != other.data_ptr() and torch.equal(mine, other)


def test_hooks_run_once_and_in_torchs_order() -> None:
    def log_of(cls: type) -> list[str]:
        log: list[str] = []
        params = small()
        optimizer = cls(params, lr=0.1)
        handles = [
            register_optimizer_step_pre_hook(lambda *_: log.append("global pre")),
            register_optimizer_step_post_hook(lambda *_: log.append("global post")),
        ]
        optimizer.register_step_pre_hook(lambda *_: log.append("pre"))
        optimizer.register_step_post_hook(lambda *_: log.append("post"))
        optimizer.register_state_dict_pre_hook(lambda *_: log.append("state pre"))
        optimizer.register_state_dict_post_hook(lambda *_: log.append("state post"))
        optimizer.register_load_state_dict_pre_hook(lambda *_: log.append("load pre"))
        optimizer.register_load_state_dict_post_hook(lambda *_: log.append("load post"))
        optimizer.register_load_state_dict_pre_hook(
            lambda *_: log.append("load first"), prepend=True
        )
        train(optimizer, params, steps=2)
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        return log

    for ours, stock in TWINS:
        assert log_of(ours) == log_of(stock)


def test_a_pre_hook_may_change_the_arguments() -> None:
    params = small()
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: ((optimizer, lambda: 42.0), {}))
    assert optimizer.step() == 42.0


def test_closure_runs_with_gradients_and_its_value_is_returned() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss is not None and loss.item() == 3.0 and (param < 1).all()


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.2, total_steps=8, cycle_momentum=bool({"betas", "momentum"} & o.defaults.keys())
        ),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(("ours", "stock"), TWINS)
def test_schedulers(ours: type, stock: type, tensor_lr: bool, scheduler: Any) -> None:
    def run(cls: type) -> list[torch.nn.Parameter]:
        params = small()
        lr: Any = torch.tensor(0.1) if tensor_lr else 0.1
        options = {"foreach": False} if cls is stock else {}
        optimizer = cls(params, lr=lr, **options)
        schedule = scheduler(optimizer)
        for step in range(6):
            train(optimizer, params, steps=1, seed=step)
            schedule.step()
        return params

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_params(run(ours), run(stock))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_tensor_hyperparameters_of_any_one_element_shape(shape: tuple[int, ...]) -> None:
    def tensor(value: float) -> Tensor:
        return torch.full(shape, value)

    ours, stock = small(), small()
    betas = (tensor(0.8), tensor(0.95))
    mine = optim.AdamW(ours, lr=tensor(0.01), betas=betas)
    theirs = torch.optim.AdamW(stock, lr=tensor(0.01), betas=betas, foreach=False)
    train(mine, ours)
    train(theirs, stock)
    assert_same_params(ours, stock)


@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_groups_of_many_kinds_in_one_step(case: OptimizerCase) -> None:
    def run(make: Any) -> list[torch.nn.Parameter]:
        kinds = (torch.float32, torch.float64, torch.complex64)
        params = [p for kind in kinds for p in small(kind)]
        params[1].requires_grad_(False)
        optimizer = make([{"params": params[:2]}, {"params": params[2:5], "lr": 0.03}])
        optimizer.add_param_group({"params": params[5:], "lr": 0.001, "weight_decay": 0.2})
        trained = [p for p in params if p.requires_grad]
        train(optimizer, trained)
        return params

    for mine, theirs in zip(run(case.make), run(case.make_stock), strict=True):
        assert_matches(mine.detach(), theirs.detach(), op="optimizer", dtype=mine.dtype)


def test_a_group_may_change_between_steps() -> None:
    def run(cls: type) -> list[torch.nn.Parameter]:
        params = small()
        options = {"foreach": False} if cls is torch.optim.SGD else {}
        optimizer = cls(params, lr=0.1, **options)
        train(optimizer, params, steps=2)
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, params, steps=3, seed=4)
        optimizer.param_groups[0]["nesterov"] = True
        optimizer.param_groups[0]["weight_decay"] = 0.1
        train(optimizer, params, steps=2, seed=6)
        optimizer.param_groups[0]["params"].pop()
        train(optimizer, params, steps=2, seed=7)
        return params

    assert_same_params(run(optim.SGD), run(torch.optim.SGD))


@pytest.mark.parametrize("case", ALL, **IDS)
def test_moved_memory_is_followed(case: OptimizerCase) -> None:
    """``.data``, shared memory, replaced state, swapped tensors, resized gradients."""
    ours, truth = small(), small()
    mine, reference = case.make(ours, backend="cpu"), case.make(truth, backend="reference")

    def replace_state() -> None:
        for state in mine.state.values():
            for key, value in state.items():
                state[key] = value.clone()

    def share_state() -> None:
        for state in mine.state.values():
            for value in state.values():
                value.share_memory_()

    def set_state_data() -> None:
        for state in mine.state.values():
            for value in state.values():
                value.data = value.data.clone()

    def swap_params() -> None:
        for param in ours:
            param.grad = None
            torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach().clone()))

    moves = [
        lambda: [setattr(p, "data", p.data.clone()) for p in ours],
        lambda: [p.share_memory_() for p in ours],
        replace_state,
        share_state,
        set_state_data,
        swap_params,
        lambda: mine.load_state_dict(mine.state_dict()),
    ]
    for seed, move in enumerate(moves):
        move()
        train(mine, ours, steps=3, seed=seed)
        train(reference, truth, steps=3, seed=seed)
        assert_same_params(ours, truth)


@pytest.mark.parametrize("case", ALL, **IDS)
def test_grad_scaler_protocol(case: OptimizerCase) -> None:
    ours, truth = small(), small()
    mine, plain = case.make(ours), case.make(truth, backend="torch")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(6):
        overflow = step == 3
        for param, other in zip(ours, truth, strict=True):
            grad = torch.randn(param.shape)
            other.grad = grad.clone()
            param.grad = grad * scaler.scale(torch.ones(()))
            if overflow:
                param.grad.view(-1)[0] = float("inf")
        before = copy.deepcopy(mine.state_dict()) if step else None
        scaler.step(mine)
        if overflow:
            _assert_equal_nested(mine.state_dict(), before)
        else:
            for param, other in zip(ours, truth, strict=True):
                assert_matches(param.grad, other.grad, op="optimizer", dtype=torch.float32)
            plain.step()
        scaler.update()
        assert_same_params(ours, truth)
    assert not hasattr(mine, "found_inf") and not hasattr(mine, "grad_scale")


def _assert_equal_nested(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            _assert_equal_nested(left[key], right[key])
    elif isinstance(left, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_first_step_skipped_by_found_inf_counts_nothing(case: OptimizerCase) -> None:
    params = small()
    before = [p.detach().clone() for p in params]
    optimizer = case.make(params)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    train(optimizer, params, steps=1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for state in optimizer.state.values():
        assert state.get("step", torch.tensor(0.0)).item() == 0
    if isinstance(optimizer, torch.optim.Adam):
        assert len(optimizer.state) == 2  # every third gradient is missing


def test_a_preset_grad_scale_multiplies_the_scalers() -> None:
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = optim.SGD([param], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    optimizer.grad_scale = torch.tensor(2.0)
    param.grad = torch.full((8,), 8.0)
    scaler.step(optimizer)
    assert_matches(param.detach(), torch.zeros(8), op="optimizer", dtype=torch.float32)
    assert_matches(param.grad, torch.ones(8), op="optimizer", dtype=torch.float32)


@pytest.mark.parametrize("case", ALL[:8:3], **IDS)
def test_scaled_expanded_and_shared_gradients(case: OptimizerCase) -> None:
    ours, truth = small(), small()
    mine, plain = case.make(ours), case.make(truth, backend="torch")
    for _ in range(3):
        for param, other in zip(ours, truth, strict=True):
            other.grad = torch.full(param.shape, 0.5)
            param.grad = torch.tensor(4.0).expand(param.shape)
        mine.grad_scale, mine.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        mine.step()
        plain.step()
    assert_same_params(ours, truth)
    assert all((param.grad == 0.5).all() for param in ours)


@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_hooks_and_overridden_steps_see_unscaled_gradients(case: OptimizerCase) -> None:
    class Clipped(case.ours):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            torch.nn.utils.clip_grad_norm_(ours, 1.0)
            return super().step(closure)

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(ours, 1.0)

    for way in ("hook", "subclass"):
        ours, truth = small(), small()
        mine = case.make(ours) if way == "hook" else Clipped(ours, **case.options)
        if way == "hook":
            mine.register_step_pre_hook(clip)
        plain = case.make_stock(truth)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            for param, other in zip(ours, truth, strict=True):
                other.grad = torch.randn(param.shape)
                param.grad = other.grad * scaler.scale(torch.ones(()))
            torch.nn.utils.clip_grad_norm_(truth, 1.0)
            plain.step()
            scaler.step(mine)
            scaler.update()
            assert_same_params(ours, truth)


def test_a_skipped_step_runs_no_hooks() -> None:
    params = small()
    optimizer = optim.SGD(params)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    train(optimizer, params, steps=1)
    assert calls == []


def test_one_gradient_for_two_parameters_under_a_scaler() -> None:
    def run(backend: str) -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(torch.ones(30, 30).t()) for _ in range(3)]
        optimizer = optim.SGD(params, lr=1.0, momentum=0.9, backend=backend)
        for _ in range(2):
            params[0].grad = params[1].grad = torch.full((30, 30), 8.0)
            params[2].grad = params[2].detach()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            optimizer.step()
        return params

    assert_same_params(run("cpu"), run("torch"))


def test_state_changed_in_place_is_seen() -> None:
    """At the same address with another dtype, shape or order: nothing may be written blindly."""

    def through_dtypes(tensor: Tensor) -> None:
        tensor.data = tensor.data.half()
        tensor.data = tensor.data.bfloat16()

    changes = {
        "dtype": through_dtypes,
        "transposed": lambda tensor: tensor.t_(),
        "larger": lambda tensor: tensor.resize_(40, 40),
    }
    for change in changes.values():
        results = []
        for backend in ("auto", "torch"):
            param = torch.nn.Parameter(torch.linspace(-1, 1, 400).view(20, 20).clone())
            optimizer = optim.Adam([param], lr=0.1, backend=backend)
            for step in range(3):
                param.grad = torch.linspace(1, 2, 400).view(20, 20)
                try:
                    optimizer.step()
                except RuntimeError as error:
                    results.append(str(error))
                    break
                if step == 0:
                    change(optimizer.state[param]["exp_avg"])
            else:
                results.append(param.detach().clone())
        mine, theirs = results
        if isinstance(theirs, str):
            assert mine == theirs
        else:
            assert_matches(mine, theirs, op="optimizer", dtype=torch.float32)


def test_step_counter_changed_in_place_is_seen() -> None:
    for dtype in (torch.int64, torch.float64, torch.float16):
        ours, stock = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
        for param, optimizer in (
            (ours, optim.Adam([ours], lr=0.1)),
            (stock, torch.optim.Adam([stock], lr=0.1, foreach=False)),
        ):
            for _ in range(3):
                param.grad = torch.ones(5)
                optimizer.step()
                counter = optimizer.state[param]["step"]
                counter.data = counter.data.to(dtype)
            assert optimizer.state[param]["step"].item() == 3
        assert_same_params([ours], [stock])
    optimizer = optim.Adam([ours], lr=0.1)
    optimizer.step()
    optimizer.state[ours]["step"].resize_(0)
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.state[ours]["step"] = 0
    with pytest.raises(RuntimeError, match="API has changed"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], **IDS)
def test_a_product_of_momenta_in_the_parameters_dtype(dtype: torch.dtype) -> None:
    """Torch casts it when a checkpoint is loaded."""
    ours, stock = small(dtype), small(dtype)
    mine = optim.NAdam(ours, eps=1e-2, backend="cpu")
    theirs = torch.optim.NAdam(stock, eps=1e-2, foreach=False)
    for optimizer, params in ((mine, ours), (theirs, stock)):
        train(optimizer, params, steps=2)
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, params, steps=3)
    assert_same_params(ours, stock, dtype)
    for param, other in zip(ours, stock, strict=True):
        product, expected = (o.state[p]["mu_product"] for o, p in ((mine, param), (theirs, other)))
        assert product.dtype == dtype
        assert_matches(product, expected, op="rounded once", dtype=dtype)


def test_state_entries_swapped_between_keys_are_seen() -> None:
    ours, stock = small(), small()
    mine, theirs = optim.Adam(ours), torch.optim.Adam(stock, foreach=False)
    for optimizer, params in ((mine, ours), (theirs, stock)):
        train(optimizer, params, steps=2)
        for state in optimizer.state.values():
            step, first, second = state["step"], state["exp_avg"], state["exp_avg_sq"]
            state.clear()
            state.update(step=step, exp_avg_sq=first.abs(), exp_avg=second)
        train(optimizer, params, steps=2)
        for state in optimizer.state.values():
            first, second = state["exp_avg"], state["exp_avg_sq"]
            state.clear()
            state.update(step=torch.tensor(2.0), exp_avg_sq=first.abs(), exp_avg=second)
        train(optimizer, params, steps=2)
    assert_same_params(ours, stock)


def test_a_refused_first_step_leaves_no_state_and_counts_as_none() -> None:
    for backend in ("cpu", "auto"):
        ours, stock = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        mine = optim.SGD([ours], lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
        theirs = torch.optim.SGD([stock], lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
        ours.grad = torch._neg_view(torch.ones(4, 4))
        if backend == "cpu":
            with pytest.raises(RuntimeError, match="cannot step"):
                mine.step()
            assert not mine.state
        else:
            stock.grad = torch.full((4, 4), -1.0)
            mine.step()
            theirs.step()
        for _ in range(2):
            for param, optimizer in ((ours, mine), (stock, theirs)):
                param.grad = torch.ones(4, 4)
                optimizer.step()
        assert_same_params([ours], [stock])
        assert_same_params(
            [mine.state[ours]["momentum_buffer"]], [theirs.state[stock]["momentum_buffer"]]
        )


def test_groups_as_tuples_and_names_fewer_than_parameters() -> None:
    params = small()
    optimizer = optim.AdamW([(f"p{i}", p) for i, p in enumerate(params)])
    optimizer.param_groups[0]["params"] = tuple(params)
    train(optimizer, params, steps=3)
    optimizer.param_groups[0]["params"] = [*params, torch.nn.Parameter(torch.ones(2))]
    assert fastopt.explain(optimizer).parameters[-1].name == ""


def test_freed_state_of_a_parameter_without_gradient_stops_nobody() -> None:
    idle, busy = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8))
    optimizer = optim.Adam([idle, busy], lr=0.1)
    for param in (idle, busy):
        param.grad = torch.ones(8)
    optimizer.step()
    optimizer.state[idle]["exp_avg"].untyped_storage().resize_(0)
    idle.grad = None
    optimizer.step()
    assert optimizer.state[busy]["step"] == 2


def test_classical_momentum_with_a_tensor_lr_in_torchs_code() -> None:
    results = []
    for backend in ("cpu", "torch"):
        param = torch.nn.Parameter(torch.tensor(1.0))
        options = {"lr": torch.tensor([0.1]), "momentum": 0.9, "classical_momentum": True}
        optimizer = optim.SGD([param], **options, backend=backend)
        param.grad = torch.tensor(1.0)
        optimizer.step()
        results.append(param)
    assert_same_params(results[:1], results[1:])


def test_the_modules_beside_the_classes_are_torchs() -> None:
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert optim.swa_utils is torch.optim.swa_utils
    assert optim.Optimizer is torch.optim.Optimizer


def test_version_counters_are_bumped() -> None:
    for case in ALL:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = case.make([param], backend="cpu")
        loss = (param**2).sum()
        param.grad = torch.ones(3)
        version = param._version
        optimizer.step()
        assert param._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_lazily_changed_and_foreign_gradients() -> None:
    """Negated, conjugated, zero and subclassed gradients hold other values than their memory."""

    class Wrapped(Tensor):
        pass

    values = torch.randn(6, dtype=torch.complex64)
    gradients = {
        "negated": (torch.float32, torch._neg_view(torch.randn(6))),
        "imaginary part of a conjugate": (torch.float32, values.conj().imag),
        "conjugated": (torch.complex64, values.conj()),
        "zero": (torch.float32, torch._efficientzerotensor((6,))),
        "subclass": (torch.float32, torch.randn(6).as_subclass(Wrapped)),
    }
    for dtype, grad in gradients.values():
        for case in ALL:
            ours, truth = (torch.nn.Parameter(torch.ones(6, dtype=dtype)) for _ in range(2))
            optimizer, other = case.make([ours]), case.make([truth], backend="torch")
            for param, stepper in ((ours, optimizer), (truth, other)):
                for _ in range(2):
                    plain = torch.ones(6, dtype=dtype)
                    for use in (plain, grad):
                        param.grad = use if param is ours else _materialised(use)
                        stepper.step()
            assert_matches(ours.detach(), truth.detach(), op="optimizer", dtype=dtype)


def _materialised(grad: Tensor) -> Tensor:
    plain = grad.as_subclass(Tensor)
    if plain._is_zerotensor():
        return torch.zeros(plain.shape)
    return plain.resolve_conj().resolve_neg().clone()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9, "dampening": 0.5}),
        ("Adagrad", {"initial_accumulator_value": 0.1, "lr_decay": 0.1}),
    ],
)
def test_sparse_gradients_where_stock_takes_them(name: str, options: dict[str, float]) -> None:
    def run(make: Any) -> Tensor:
        weight = torch.nn.Parameter(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
        optimizer = make([weight], lr=0.1, **options)
        for step in range(3):
            optimizer.zero_grad()
            rows = torch.tensor([1, 3, 3, step])
            out = torch.nn.functional.embedding(rows, weight, sparse=True)
            out.sum().backward()
            optimizer.step()
        return weight.detach()

    expected = run(lambda *a, **k: getattr(torch.optim, name)(*a, foreach=False, **k))
    assert_matches(run(getattr(optim, name)), expected, op="optimizer", dtype=torch.float32)


@pytest.mark.parametrize(
    "name",
    ["Adam", "AdamW", "Adamax", "Lion", "NAdam", "RAdam", "RMSprop", "ScheduleFreeAdamW"],
)
def test_sparse_gradients_raise_where_stock_does_and_change_nothing(name: str) -> None:
    dense, sparse = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = OptimizerCase(name, getattr(optim, name), None).make([dense, sparse])
    dense.grad, sparse.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert (dense == 1).all() and (sparse == 1).all()


def test_differentiable_goes_to_torch_and_records() -> None:
    start = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for ours, _ in TWINS:
        param = start.clone()
        optimizer = ours([param], lr=0.1, differentiable=True)
        param.grad = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
        optimizer.step()
        (gradient,) = torch.autograd.grad(param.sum(), start)
        assert gradient.shape == (3,)


def test_capturable_raises_on_a_cpu_as_in_stock() -> None:
    def message(cls: type, **options: Any) -> str:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = cls([param], capturable=True, **options)
        param.grad = torch.ones(3)
        with pytest.raises(AssertionError) as error:
            optimizer.step()
        return str(error.value)

    for ours, stock in TWINS:
        if "capturable" in inspect.signature(stock).parameters:
            assert message(ours) == message(stock, foreach=False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"foreach": True, "fused": True}, RuntimeError),
        ({"fused": True, "differentiable": True}, RuntimeError),
        ({"lr": -1.0}, ValueError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"weight_decay": -1}, ValueError),
        ({"betas": (1.0, 0.9)}, ValueError),
        ({"betas": (0.9, torch.tensor(0.9))}, ValueError),
        ({"eps": -1}, ValueError),
        ({"momentum": -0.5}, ValueError),
        ({"nesterov": True}, ValueError),
        ({"lr": torch.tensor(0.1), "foreach": True}, ValueError),
    ],
)
@pytest.mark.parametrize(("ours", "stock"), TWINS)
def test_constructor_errors_are_torchs(
    ours: type, stock: type, options: dict[str, Any], error: type[Exception]
) -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    if not set(options) <= set(inspect.signature(stock).parameters):
        pytest.skip(f"{stock.__name__} has no such option")
    try:
        stock(params, **options)
    except Exception as expected:
        with pytest.raises(type(expected)) as raised:
            ours(params, **options)
        assert str(raised.value) == str(expected)
    else:
        ours(params, **options)


def test_parameter_errors_are_torchs() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    bad: list[Any] = [
        param,
        [],
        [1],
        [{"params": {param}}],
        [{"params": [param]}, {"params": [param]}],
        [param * 2],
    ]
    for params in bad:
        with pytest.raises((TypeError, ValueError)) as expected:
            torch.optim.SGD(params)
        for ours in (optim.SGD, optim.Adam, optim.AdamW, optim.Lion):
            with pytest.raises(type(expected.value)) as raised:
                ours(params)
            assert str(raised.value) == str(expected.value)


def test_own_errors_name_argument_and_value() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'gpu'"):
        optim.Adam(params, backend="gpu")
    with pytest.raises(ValueError, match="Classical momentum requires a momentum"):
        optim.SGD(params, classical_momentum=True)
    with pytest.raises(ValueError, match="Classical momentum requires a momentum"):
        optim.SGD(params, momentum=0.9, dampening=0.1, classical_momentum=True)
    for options, text in (
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": torch.ones(3)}, "Tensor lr must be 1-element"),
        ({"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ):
        with pytest.raises(ValueError, match=text):
            optim.Lion(params, **options)


def test_no_gradients_at_all_is_no_step() -> None:
    for case in ALL:
        params = small()
        optimizer = case.make(params)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.step()
        if before:  # Adagrad's is there from the beginning
            _assert_equal_nested(optimizer.state_dict()["state"], before)
        else:
            assert not any(optimizer.state.values())
        optimizer.zero_grad()
        optimizer.step()


def test_dropped_optimizers_free_their_state_at_once() -> None:
    for case in ALL:
        params = small()
        optimizer = case.make(params, backend="cpu")
        train(optimizer, params, steps=2)
        tensors = [weakref.ref(v) for state in optimizer.state.values() for v in state.values()]
        gc.collect()
        gc.disable()
        try:
            del optimizer
            assert all(ref() is None for ref in tensors)
        finally:
            gc.enable()


def test_a_parameter_that_holds_its_optimizer_is_collected() -> None:
    def train_once() -> weakref.ref[torch.nn.Parameter]:
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = optim.AdamW([param], backend="cpu")
        param.optimizer = optimizer  # type: ignore[attr-defined]
        param.grad = torch.ones(5)
        optimizer.step()
        return weakref.ref(param)

    alive = train_once()
    gc.collect()
    assert alive() is None


def test_a_step_allocates_nothing_of_a_parameters_size() -> None:
    import tracemalloc

    size = 4 * 1024 * 1024
    for case in ALL:
        param = torch.nn.Parameter(torch.ones(size))
        param.grad = torch.ones(size)
        optimizer = case.make([param], backend="cpu")
        optimizer.step()
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        grown = sum(max(event.cpu_memory_usage, 0) for event in profile.events())
        assert grown < 1024, f"{case.name}: {grown} bytes from torch's allocator"
        before = _peak_resident()
        tracemalloc.start()
        optimizer.step()
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
        tracemalloc.stop()
        assert _peak_resident() - before < size  # a quarter of the parameter


def _peak_resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_default_dtype_of_double_counts_in_double() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        params, stock = parameters(torch.float64, shapes=((5,),)), None
        optimizer = optim.AdamW(params)
        train(optimizer, params, steps=2)
        assert optimizer.state[params[0]]["step"].dtype == torch.float64
        stock = clones(parameters(torch.float64, shapes=((5,),)))
        train(torch.optim.AdamW(stock), stock, steps=2)
        assert_same_params(params, stock, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def test_old_checkpoints_with_a_number_as_step() -> None:
    params = small()
    optimizer = optim.AdamW(params)
    train(optimizer, params, steps=3)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    fresh = optim.AdamW(params)
    fresh.load_state_dict(state)
    train(fresh, params, steps=1)
    assert all(isinstance(entry["step"], Tensor) for entry in fresh.state.values())


@pytest.mark.parametrize("case", ALL, **IDS)
def test_a_compiled_step_gives_the_same(case: OptimizerCase) -> None:
    ours, compiled = small(), small()
    mine, other = case.make(ours), case.make(compiled)
    step = torch.compile(other.step, backend="eager")
    for _ in range(3):
        for param, twin in zip(ours, compiled, strict=True):
            param.grad = torch.randn(param.shape)
            twin.grad = param.grad.clone()
        mine.step()
        step()
    torch._dynamo.reset()
    assert_same_params(ours, compiled)


def test_the_profiler_sees_a_range_for_each_step() -> None:
    params = small()
    optimizer = optim.AdamW(params)
    train(optimizer, params, steps=1)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert names.count("Optimizer.step#AdamW.step") == 2


def test_meta_and_inference_parameters_are_torchs_matter() -> None:
    meta = torch.nn.Parameter(torch.ones(3, device="meta"))
    meta.grad = torch.ones(3, device="meta")
    optim.AdamW([meta]).step()
    with torch.inference_mode():
        param = torch.ones(3)
        param.grad = torch.ones(3)
        optimizer = optim.SGD([param], lr=0.5)
        optimizer.step()
        assert (param == 0.5).all()

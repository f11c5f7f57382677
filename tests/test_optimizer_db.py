"""Torch's own database of optimizer tests, driven with our classes."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch

from cases import COUNTERS, parameters, train
from fastopt import optim
from tolerances import assert_matches, assert_no_worse_than_stock

pytest.importorskip("expecttest", reason="torch's test utilities need it")
from torch.testing._internal.common_optimizers import optim_db

LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)
NAMES = ("SGD", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop")
OURS = {name: getattr(optim, name) for name in NAMES}


def _info_with_our_class(info: Any) -> Any:
    info = copy.copy(info)
    info.stock_cls, info.optim_cls = info.optim_cls, OURS[info.optim_cls.__name__]
    return info


INFOS = [_info_with_our_class(info) for info in optim_db if info.optim_cls.__name__ in OURS]
CONFIGURATIONS = [
    pytest.param(info, config.kwargs, id=f"{info.optim_cls.__name__}-{config.desc}")
    for info in INFOS
    for config in info.optim_inputs_func("cpu")
]
ERRORS = [
    pytest.param(info, error, id=f"{info.optim_cls.__name__}-{index}")
    for info in INFOS
    for index, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


def test_the_database_has_our_optimizers() -> None:
    assert {info.optim_cls.__name__ for info in INFOS} == set(OURS)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("info", "options"), CONFIGURATIONS)
def test_every_configuration_matches_the_loop(
    info: Any, options: dict[str, Any], dtype: torch.dtype, flags: dict[str, bool]
) -> None:
    options = copy.deepcopy(options)
    arguments = inspect.signature(info.stock_cls).parameters
    if not set(flags) <= set(arguments):
        pytest.skip(f"{info.stock_cls.__name__} has no such option")
    if dtype is torch.float16 and "eps" in arguments:
        options["eps"] = 1e-2  # torch's default is zero in half precision
    if isinstance(options.get("lr"), torch.Tensor) and "foreach" in flags:
        flags = {}
    ours = parameters(dtype, shapes=((10, 5), (64,), (), (3, 700)))
    stock = copy.deepcopy(ours)
    for params in (ours, stock):
        params[1].requires_grad_(False)
    mine = info.optim_cls(ours, **copy.deepcopy(options), **flags)
    theirs = info.stock_cls(stock, **copy.deepcopy(options), foreach=False)
    exact = [torch.nn.Parameter(p.detach().double().clone(), p.requires_grad) for p in ours]
    truth = info.stock_cls(exact, **copy.deepcopy(options), foreach=False)
    for optimizer, params in ((mine, ours), (theirs, stock), (truth, exact)):
        train(
            optimizer,
            [p for p in params if p.requires_grad],
            steps=7,
            gradient=lambda grad: grad.to(dtype).to(params[0].dtype),  # noqa: B023
        )
    for param, other, true in zip(ours, stock, exact, strict=True):
        if dtype in LOW_PRECISION:  # where stock's errors of each operation add up
            assert_no_worse_than_stock(param.detach(), other.detach(), true.detach())
        else:
            assert_matches(param.detach(), other.detach(), op="optimizer", dtype=dtype)
        assert mine.state[param].keys() == theirs.state[other].keys()
        for key, value in theirs.state[other].items():
            tensor = mine.state[param][key]
            assert tensor.dtype == value.dtype and tensor.shape == value.shape
            if key in COUNTERS or dtype not in LOW_PRECISION:
                op_dtype = torch.float32 if key in COUNTERS else dtype
                assert_matches(tensor, value, op="optimizer", dtype=op_dtype)


@pytest.mark.parametrize(("info", "error"), ERRORS)
def test_every_error_is_torchs(info: Any, error: Any) -> None:
    config = error.optimizer_error_input
    params = [torch.nn.Parameter(torch.ones(2))] if config.params is None else config.params
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            info.optim_cls(params, **config.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            info.optim_cls(params, **config.kwargs)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)
def test_goes_downhill_with_every_scheduler(info: Any, contiguous: bool) -> None:
    for schedulers in ((), *info.scheduler_inputs):
        weight = torch.nn.Parameter(
            torch.randn(10, 5) if contiguous else torch.randn(10, 5, 2)[..., 0]
        )
        bias = torch.nn.Parameter(torch.randn(10) if contiguous else torch.randn(10, 2)[..., 0])
        inputs = torch.randn(5)
        optimizer = info.optim_cls([weight, bias], lr=0.01)
        steppers = [make(optimizer) for make in schedulers]

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = (weight.mv(inputs) + bias).pow(2).sum()  # noqa: B023
            loss.backward()
            return loss

        first = closure().item()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(20):
                loss = optimizer.step(closure)
                for scheduler in steppers:
                    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
                    scheduler.step(loss) if isinstance(scheduler, plateau) else scheduler.step()
        assert closure().item() < first

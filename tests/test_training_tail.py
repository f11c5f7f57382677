"""Clipping, zeroing and averaging in the step: the numbers of stock's calls around a stock step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import swa_utils

from cases import ALL, WITH_STOCK, OptimizerCase, clones, parameters, random, train
from fastopt import optim
from tolerances import assert_matches, assert_no_worse_than_stock

IDS = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}
REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TAIL = {"max_grad_norm": 1.0, "zero_grad_after_step": True, "ema_decay": 0.8}
ADAMW = next(case for case in WITH_STOCK if case.name == "adamw")
Params = list[torch.nn.Parameter]


class StockTail:
    """What people write around a step of stock's."""

    def __init__(
        self,
        case: OptimizerCase,
        params: Params,
        *,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        clip_value: float | None = None,
        zero_grad_after_step: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        self.params = params
        self.optimizer = case.make_stock(params)
        self.max_grad_norm, self.norm_type = max_grad_norm, norm_type
        self.clip_value, self.zeroes = clip_value, zero_grad_after_step
        self.model = torch.nn.ParameterList(params)
        self.averaged = None
        if ema_decay is not None:
            average = swa_utils.get_ema_multi_avg_fn(ema_decay)
            self.averaged = swa_utils.AveragedModel(self.model, multi_avg_fn=average)

    def step(self) -> None:
        if self.max_grad_norm is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(
                self.params, self.max_grad_norm, self.norm_type
            )
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.params, self.clip_value)
        self.optimizer.step()
        if self.zeroes:
            self.optimizer.zero_grad(set_to_none=False)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)


@pytest.mark.parametrize("dtype", REAL_DTYPES, **IDS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 1e6},
        {"clip_value": 0.3},
        {"max_grad_norm": 3.0, "clip_value": 0.02, "zero_grad_after_step": True},
        {"zero_grad_after_step": True},
        {"ema_decay": 0.8},
        {"ema_decay": 0.3},
        TAIL,
    ],
    ids=str,
)
def test_matches_stocks_calls(options: dict[str, Any], dtype: torch.dtype) -> None:
    for case in (WITH_STOCK[0], WITH_STOCK[3], ADAMW):
        ours = parameters(dtype)
        theirs = clones(ours)
        optimizer = case.make(ours, backend="cpu", **options)
        stock = StockTail(case, theirs, **options)
        train(optimizer, ours, steps=4)
        train(stock, theirs, steps=4)  # type: ignore[arg-type]
        for mine, other in zip(ours, theirs, strict=True):
            assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=dtype)
            if mine.grad is not None:
                assert other.grad is not None
                assert_matches(mine.grad, other.grad, op="optimizer", dtype=dtype)
        if "max_grad_norm" in options:
            assert optimizer.grad_norm.dtype == dtype and optimizer.grad_norm.dim() == 0
            assert_matches(optimizer.grad_norm, stock.grad_norm, op="grad_norm", dtype=dtype)
        if stock.averaged is not None:
            for mine, other in zip(
                optimizer.ema_parameters(), stock.averaged.parameters(), strict=True
            ):
                assert_matches(mine, other.detach(), op="optimizer", dtype=dtype)


@pytest.mark.parametrize("dtype", (*REAL_DTYPES, torch.complex64), **IDS)
@pytest.mark.parametrize("case", ALL, **IDS)
def test_matches_the_reference(case: OptimizerCase, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    options = {**TAIL, "clip_value": 0.4}
    optimizer = case.make(ours, backend="cpu", **options)
    train(optimizer, ours, steps=4)
    copied = copy.deepcopy({"params": ours, "optimizer": optimizer})
    reference = copied["optimizer"]
    reference._backend = "reference"
    train(optimizer, ours, steps=1)
    train(reference, copied["params"], steps=1)
    for mine, truth in zip(ours, copied["params"], strict=True):
        assert_matches(mine.detach(), truth.detach(), op="optimizer", dtype=dtype)
        assert mine.grad is None or not mine.grad.any()
        for key, value in reference.state[truth].items():
            exact_dtype = value.dtype if key == "step" else dtype
            assert_matches(optimizer.state[mine][key], value, op="optimizer", dtype=exact_dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), **IDS)
def test_low_precision_is_no_worse_than_stock(dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    theirs = clones(ours)
    truth = [torch.nn.Parameter(param.detach().double()) for param in ours]
    options = {"max_grad_norm": 1.0, "ema_decay": 0.5}
    optimizer = ADAMW.make(ours, backend="cpu", **options)
    stock, exact = StockTail(ADAMW, theirs, **options), StockTail(ADAMW, truth, **options)
    train(optimizer, ours, seed=3)
    train(stock, theirs, seed=3)  # type: ignore[arg-type]
    train(exact, truth, seed=3, gradient=lambda grad: grad.to(dtype).double())  # type: ignore[arg-type]
    assert stock.averaged is not None and exact.averaged is not None
    for mine, other, right in zip(
        [*ours, *optimizer.ema_parameters()],
        [*theirs, *stock.averaged.parameters()],
        [*truth, *exact.averaged.parameters()],
        strict=True,
    ):
        if mine.numel():
            assert_no_worse_than_stock(mine.detach(), other.detach(), right.detach())


@pytest.mark.parametrize("order", [2.0, 1.0, 0.0, 3.0, 0.5, -1.0, float("inf"), float("-inf")])
def test_norm_types(order: float) -> None:
    ours = [p for p in parameters(torch.float64) if p.numel()]
    theirs = clones(ours)
    optimizer = ADAMW.make(ours, backend="cpu", max_grad_norm=0.7, norm_type=order)
    stock = StockTail(ADAMW, theirs, max_grad_norm=0.7, norm_type=order)
    train(optimizer, ours, steps=3)
    train(stock, theirs, steps=3)  # type: ignore[arg-type]
    assert_matches(optimizer.grad_norm, stock.grad_norm, op="optimizer", dtype=torch.float64)
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float64)


def test_the_norm_is_that_of_all_groups_and_dtypes() -> None:
    wide, narrow = parameters(torch.float32), parameters(torch.bfloat16, seed=5)
    sparse = torch.nn.Parameter(torch.ones(10, 3))
    params = [*wide, *narrow, sparse]
    theirs = clones(params)

    def groups(all_params: Params) -> list[dict[str, Any]]:
        cut = len(wide)
        return [{"params": all_params[:cut]}, {"params": all_params[cut:], "lr": 0.5}]

    case = WITH_STOCK[0]
    optimizer = case.make(groups(params), max_grad_norm=1.0, zero_grad_after_step=True)
    stock = case.make_stock(groups(theirs))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(params, theirs, strict=True):
            mine.grad = random(tuple(mine.shape), mine.dtype, generator)
            if mine is sparse:
                index = torch.tensor([[1, 4, 1]])
                mine.grad = torch.sparse_coo_tensor(index, torch.ones(3, 3), (10, 3))
                other.grad = mine.grad.to_dense()
            else:
                other.grad = mine.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        stock.step()
        assert_matches(optimizer.grad_norm, norm.float(), op="mixed", dtype=torch.float32)
    for mine, other in zip(params, theirs, strict=True):
        assert_matches(mine.detach(), other.detach(), op="mixed", dtype=mine.dtype)
    assert not sparse.grad.to_dense().any()


def test_a_nonfinite_norm_raises_before_anything_changes() -> None:
    for backend in ("cpu", "torch", "reference"):
        params = parameters(torch.float32)
        optimizer = ADAMW.make(
            params, max_grad_norm=1.0, error_if_nonfinite=True, ema_decay=0.9, backend=backend
        )
        before = clones(params)
        for number, param in enumerate(params):
            param.grad = torch.full_like(param, float("inf") if number == 4 else 1.0)
        with pytest.raises(RuntimeError, match=r"The total norm of order 2\.0 for gradients"):
            optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert torch.equal(param, old)
            assert param.grad is not None
            assert (param.grad == 1).all() or param.grad.isinf().all()
            assert optimizer.state[param].get("step", torch.zeros(())) == 0
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.grad_norm.isfinite()


def test_a_nonfinite_norm_scales_as_in_stock() -> None:
    for value in (float("inf"), float("nan")):
        ours = parameters(torch.float32)
        theirs = clones(ours)
        case = WITH_STOCK[0]
        optimizer, stock = (
            case.make(ours, max_grad_norm=1.0),
            StockTail(case, theirs, max_grad_norm=1.0),
        )
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.ones_like(mine)
            mine.grad.view(-1)[:1] = value
            other.grad = mine.grad.clone()
        optimizer.step()
        stock.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)


def test_the_norm_and_the_step_are_the_same_for_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        params = parameters(torch.float32, shapes=((70_000,), (3, 1400), (7,), (100_001,)))
        optimizer = ADAMW.make(params, backend="cpu", **TAIL)
        train(optimizer, params, steps=3)
        results.append([optimizer.grad_norm, *params, *optimizer.ema_parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("options", [{}, TAIL], ids=str)
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded gradient"])
def test_any_layout(kind: str, options: dict[str, Any]) -> None:
    def make() -> Params:
        generator = torch.Generator().manual_seed(3)
        values = random((40, 70), torch.float32, generator)
        params = [torch.nn.Parameter(values.clone().t()), torch.nn.Parameter(torch.ones(12))]
        if kind == "sliced":
            buffer = torch.full((70, 90), 7.0)
            buffer[:, 3:43] = values.t()
            params[0] = torch.nn.Parameter(buffer[:, 3:43])
            params[0].buffer = buffer  # type: ignore[attr-defined]
        return params

    ours, theirs = make(), make()
    optimizer, stock = (
        ADAMW.make(ours, backend="cpu", **options),
        StockTail(ADAMW, theirs, **options),
    )
    for step in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            grad = torch.randn(mine.shape) * (step + 1)
            other.grad = grad.clone()
            if kind == "expanded gradient":
                mine.grad = grad[:1].expand(mine.shape)
                other.grad = mine.grad.contiguous()
            elif mine.dim() == 2 and step != 1:
                mine.grad = grad.t().contiguous().t()
            else:
                mine.grad = grad
        optimizer.step()
        stock.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)
            assert mine.grad is not None and other.grad is not None
            assert_matches(mine.grad, other.grad, op="optimizer", dtype=torch.float32)
    if kind == "sliced":
        buffer = ours[0].buffer  # type: ignore[attr-defined]
        assert (buffer[:, :3] == 7).all() and (buffer[:, 43:] == 7).all()


def test_gradients_that_share_memory_are_separated_before_they_are_written() -> None:
    for backend in ("cpu", "torch"):
        params = [torch.nn.Parameter(torch.ones(600)) for _ in range(3)]
        params[0].grad = params[1].grad = torch.full((600,), 4.0)
        params[2].grad = params[2].detach()
        optimizer = optim.SGD(params, lr=1.0, clip_value=0.5, backend=backend)
        optimizer.step()
        for param in params:
            assert (param == 0.5).all()


def test_under_a_gradient_scaler() -> None:
    def run(make: Callable[[Params], Any], unscale_first: bool) -> Params:
        params = parameters(torch.float32, shapes=((5, 3), (7,)))
        optimizer = make(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            loss = sum((param**2).sum() * (step + 1) for param in params)
            if step == 2:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if unscale_first or not isinstance(optimizer, optim.AdamW):
                scaler.unscale_(optimizer)
            if not isinstance(optimizer, optim.AdamW):
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        return params

    stock = run(lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False), True)
    for unscale_first in (False, True):
        ours = run(lambda params: optim.AdamW(params, lr=0.1, max_grad_norm=1.0), unscale_first)
        for mine, other in zip(ours, stock, strict=True):
            assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)


def test_a_scaled_step_reports_the_unscaled_norm_and_leaves_what_the_update_saw() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([param], lr=1.0, max_grad_norm=1.0)
    param.grad = torch.full((4,), 16.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    assert optimizer.grad_norm == 4.0  # of four times 2
    assert torch.allclose(param.grad, torch.full((4,), 0.5)) and torch.allclose(param, -param.grad)
    optimizer.found_inf = torch.tensor(1.0)
    param.grad.fill_(16.0)
    optimizer.step()
    assert (param.grad == 16).all() and optimizer.grad_norm == 4.0


def test_a_scale_that_is_no_number_of_the_gradients_dtype() -> None:
    for hooked in (False, True):
        param = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
        optimizer = optim.SGD([param], lr=1.0, backend="torch")
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: None)
        param.grad = torch.full_like(param, 3000.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3e6), torch.tensor(0.0)
        optimizer.step()
        expected = torch.full_like(param, 3000.0).mul_(1 / 3e6)
        assert torch.equal(param.grad, expected)


def test_averages_wait_for_a_first_gradient_and_move_without_one() -> None:
    for backend in ("cpu", "torch", "reference"):
        ours = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(3)]
        theirs = clones(ours)
        optimizer = ADAMW.make(ours, backend=backend, ema_decay=0.5)
        stock = StockTail(ADAMW, theirs, ema_decay=0.5)
        assert all(a is not b for a, b in zip(optimizer.ema_parameters(), ours, strict=True))
        for step in range(5):
            for i in range(3):
                gone = i == 2 or (i == 1 and step in (0, 3))
                ours[i].grad = None if gone else torch.ones(3)
                theirs[i].grad = None if gone else torch.ones(3)
            optimizer.step()
            stock.step()
            assert stock.averaged is not None
            for mine, other in zip(
                optimizer.ema_parameters(), stock.averaged.parameters(), strict=True
            ):
                assert_matches(mine, other.detach(), op="optimizer", dtype=torch.float32)
        assert "ema" not in optimizer.state[ours[2]]


def test_average_parameters_exchanges_and_comes_back() -> None:
    params = parameters(torch.float32)
    optimizer = ADAMW.make(params, ema_decay=0.5)
    train(optimizer, params, steps=3)
    trained, averages = clones(params), [a.clone() for a in optimizer.ema_parameters()]
    version = params[3]._version
    with pytest.raises(ZeroDivisionError), optimizer.average_parameters():
        for param, average in zip(params, averages, strict=True):
            assert torch.equal(param, average)
        for forbidden in (
            optimizer.step,
            optimizer.state_dict,
            optimizer.ema_parameters,
            lambda: optimizer.load_state_dict({}),
            lambda: copy.deepcopy(optimizer),
            optimizer.average_parameters().__enter__,
        ):
            with pytest.raises(RuntimeError, match="inside average_parameters"):
                forbidden()
        raise ZeroDivisionError
    assert params[3]._version > version
    for param, old, average, kept in zip(
        params, trained, optimizer.ema_parameters(), averages, strict=True
    ):
        assert torch.equal(param, old) and torch.equal(average, kept)
    train(optimizer, params, steps=1)
    plain = ADAMW.make(params)
    with pytest.raises(RuntimeError, match="no averages are kept"):
        plain.ema_parameters()


def _through_state_dict(optimizer: Any, params: Params) -> tuple[Any, Params]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = clones(params)
    fresh = ADAMW.make(copied, **TAIL)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh, copied


def _through_pickle(optimizer: Any, params: Params) -> tuple[Any, Params]:
    return pickle.loads(pickle.dumps((optimizer, params)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [copy.deepcopy, _through_pickle, _through_state_dict])
def test_averages_and_options_survive(way: Callable[..., Any]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = ADAMW.make(params, **TAIL)
    train(optimizer, params, steps=3)
    if way is copy.deepcopy:
        other, copied = way((optimizer, params))
    else:
        other, copied = way(optimizer, params)
    for one, two in ((optimizer, params), (other, copied)):
        train(one, two, steps=2, seed=9)
    assert other.max_grad_norm == 1.0 and other.zero_grad_after_step
    for left, right in zip(
        [*params, *optimizer.ema_parameters()], [*copied, *other.ema_parameters()], strict=True
    ):
        assert torch.equal(left, right)


def test_checkpoints_with_averages_load_into_stock_and_stocks_here() -> None:
    params = parameters(torch.float32)
    optimizer = ADAMW.make(params, ema_decay=0.5)
    train(optimizer, params, steps=3)
    theirs = clones(params)
    stock = ADAMW.make_stock(theirs)
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(stock, theirs, steps=2, seed=4)
    train(optimizer, params, steps=2, seed=4)
    for mine, other in zip(params, theirs, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)
    plain = ADAMW.make_stock(clones(theirs))
    train(plain, plain.param_groups[0]["params"], steps=1)
    fresh = ADAMW.make(theirs, ema_decay=0.5)
    fresh.load_state_dict(copy.deepcopy(plain.state_dict()))
    fresh_momentum = fresh.state[theirs[3]]["exp_avg"].clone()
    for param in theirs:
        param.grad = torch.zeros_like(param)
    fresh.step()
    assert torch.equal(fresh.ema_parameters()[3], theirs[3])
    assert not torch.equal(fresh.state[theirs[3]]["exp_avg"], fresh_momentum)


def test_momentum_goes_on_where_averages_begin_later() -> None:
    params, plain = ([torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer, other = optim.SGD(params, **options), optim.SGD(plain, **options)
    for step in range(4):
        if step == 2:
            optimizer.ema_decay = 0.9
        params[0].grad, plain[0].grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        other.step()
    assert torch.equal(params[0], plain[0])
    assert "ema" in optimizer.state[params[0]]


def test_options_may_change_between_steps() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([param], lr=1.0)
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert optimizer.grad_norm is None and (param.grad != 0).all()
    optimizer.max_grad_norm, optimizer.zero_grad_after_step = 0.5, True
    optimizer.step()
    assert optimizer.grad_norm == 5.0 and not param.grad.any()
    assert torch.allclose(param, torch.tensor([-3.3, -4.4]))


def test_a_compiled_step_does_the_same() -> None:
    ours, compiled = parameters(torch.float32), parameters(torch.float32)
    options = {**TAIL, "clip_value": 0.4}
    mine, other = ADAMW.make(ours, **options), ADAMW.make(compiled, **options)
    step = torch.compile(other.step, backend="eager")
    for _ in range(3):
        for param, twin in zip(ours, compiled, strict=True):
            param.grad = torch.randn(param.shape)
            twin.grad = param.grad.clone()
        mine.step()
        step()
    torch._dynamo.reset()
    for left, right in zip(
        [*ours, *mine.ema_parameters()], [*compiled, *other.ema_parameters()], strict=True
    ):
        assert_matches(left.detach(), right.detach(), op="optimizer", dtype=torch.float32)


def test_accumulated_gradients_are_clipped_once() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = ADAMW.make(ours, max_grad_norm=0.5, zero_grad_after_step=True)
    stock = StockTail(ADAMW, theirs, max_grad_norm=0.5, zero_grad_after_step=True)
    for step in range(6):
        for params in (ours, theirs):
            sum(((param + step) ** 2).sum() for param in params).backward()
        if step % 3 == 2:
            optimizer.step()
            stock.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "Invalid max_grad_norm value: -1.0"),
        ({"max_grad_norm": float("nan")}, ValueError, "Invalid max_grad_norm value: nan"),
        ({"clip_value": -0.5}, ValueError, "Invalid clip_value value: -0.5"),
        ({"norm_type": float("nan")}, ValueError, "Invalid norm_type value: nan"),
        ({"max_grad_norm": "x"}, ValueError, "Invalid max_grad_norm value: 'x'"),
        ({"clip_value": "x"}, ValueError, "Invalid clip_value value: 'x'"),
        ({"norm_type": "x"}, ValueError, "Invalid norm_type value: 'x'"),
        ({"norm_type": None}, ValueError, "Invalid norm_type value: None"),
        ({"ema_decay": "x"}, ValueError, "Invalid decay value 'x' provided"),
        ({"zero_grad_after_step": "yes"}, ValueError, "Invalid zero_grad_after_step value: 'yes'"),
        ({"error_if_nonfinite": 1}, ValueError, "Invalid error_if_nonfinite value: 1"),
        ({"ema_decay": 1.5}, ValueError, "Invalid decay value 1.5 provided"),
        ({"max_norm": 1.0}, TypeError, "AdamW.__init__.. got an unexpected .* 'max_norm'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        optim.AdamW([torch.nn.Parameter(torch.ones(2))], **options)


def test_the_norm_of_infinite_order_by_its_name() -> None:
    assert optim.SGD([torch.nn.Parameter(torch.ones(2))], norm_type="inf").norm_type == torch.inf


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_skipped_step_zeroes_gradients_so_that_training_goes_on(backend: str) -> None:
    def run(ours: bool) -> float:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer: Any = torch.optim.SGD([param], lr=0.1)
        if ours:
            optimizer = optim.SGD([param], lr=0.1, zero_grad_after_step=True, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            loss = (param**2).sum() * (float("inf") if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if not ours:
                optimizer.zero_grad(set_to_none=False)
        return param[0].item()

    assert run(True) == pytest.approx(run(False))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_first_step_without_gradients_begins_the_averages(backend: str) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.ones(2))] for _ in range(2))
    case = WITH_STOCK[0]
    optimizer = case.make(ours, backend=backend, ema_decay=0.9)
    stock = StockTail(case, theirs, ema_decay=0.9)
    for step in range(4):
        for params in (ours, theirs):
            params[0].grad = None if step == 0 else torch.ones(2)
        optimizer.step()
        stock.step()
    assert stock.averaged is not None
    (average,) = stock.averaged.parameters()
    assert_matches(
        optimizer.ema_parameters()[0], average.detach(), op="optimizer", dtype=torch.float32
    )


def test_parameters_that_share_memory_come_back_from_their_averages() -> None:
    buffer = torch.ones(6)
    params = [torch.nn.Parameter(buffer[:4]), torch.nn.Parameter(buffer[2:])]
    optimizer = optim.SGD(params, lr=0.1, ema_decay=0.5)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(4)
        optimizer.step()
    before = [buffer.clone(), *(average.clone() for average in optimizer.ema_parameters())]
    with optimizer.average_parameters():
        assert not torch.equal(buffer, before[0])
    after = [buffer, *optimizer.ema_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_zeroed_gradients_leave_their_graph(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([param], lr=0.1, zero_grad_after_step=True, backend=backend)
    for _ in range(2):
        (param**3).sum().backward(create_graph=True)
        optimizer.step()
        assert param.grad is not None and param.grad.grad_fn is None
        assert not param.grad.requires_grad and not param.grad.any()


def test_subclasses_are_stepped_once() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def make() -> Params:
        return [torch.nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4))) for _ in range(2)]

    ours, theirs = make(), make()
    optimizer = ADAMW.make(ours, max_grad_norm=1.0, zero_grad_after_step=True)
    stock = ADAMW.make_stock(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = TwoTensor(torch.ones(4), torch.ones(4))
        other.grad = TwoTensor(torch.ones(4), torch.ones(4))
    torch.nn.utils.clip_grad_norm_(theirs, 1.0, foreach=False)
    optimizer.step()
    stock.step()
    assert optimizer.state[ours[0]]["step"] == 1
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine.detach().a, other.detach().a, op="optimizer", dtype=torch.float32)


def test_the_default_device_does_not_matter() -> None:
    params = parameters(torch.float32)
    optimizer = ADAMW.make(params, max_grad_norm=1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.grad_norm.device.type == "cpu"


def test_a_compiled_step_under_a_scaler_unscales_and_skips() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([param], lr=0.1)
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale((param**2).sum() * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    torch._dynamo.reset()
    assert param[0].item() == pytest.approx(0.64)

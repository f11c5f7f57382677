"""A card's kernels of the optimizers: stock's numbers, on a card or on what plays one."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from cards import CARD_BACKENDS, DEVICE, IS_SIMULATED, card, read_on_card  # noqa: F401
from cases import ALL, COUNTERS, DTYPES, WITH_STOCK, OptimizerCase, random
from fastopt import optim
from fastopt.backends import registry, selfcheck
from fastopt.backends.card_plan import CardPlan
from fastopt.ops import optimizer_step as operator
from tolerances import assert_matches

pytestmark = pytest.mark.usefixtures("card")

IDS = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}
SHAPES = ((), (0,), (1,), (7,), (64, 3), (1000,), (2, 0, 3), (4097,))
# A program of the interpreter takes 20 ms: packs of 16 bytes, and a rest.
FEW_SHAPES = ((0,), (1030,))
TAIL = {"max_grad_norm": 1.0, "zero_grad_after_step": True, "ema_decay": 0.8, "clip_value": 0.4}
ADAMW = next(case for case in WITH_STOCK if case.name == "adamw")
NADAM = next(case for case in WITH_STOCK if case.name == "nadam-l2")
Params = list[torch.nn.Parameter]


@pytest.fixture(params=CARD_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shapes(backend: str) -> tuple[tuple[int, ...], ...]:
    return FEW_SHAPES if IS_SIMULATED and backend == "triton" else SHAPES


def parameters(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(random(s, dtype, generator).to(DEVICE)) for s in shapes]


def clones(params: Params) -> Params:
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def train(optimizer: Any, params: Params, *, steps: int = 3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for index, param in enumerate(params):
            grad = random(tuple(param.shape), param.dtype, generator).to(DEVICE)
            param.grad = None if (step + index) % 3 == 2 else grad
        optimizer.step()


def assert_same_run(ours: Any, params: Params, theirs: Any, others: Params) -> None:
    for mine, other in zip(params, others, strict=True):
        dtype = mine.dtype
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=dtype)
        for key, value in theirs.state[other].items():
            tensor = ours.state[mine][key]
            assert tensor.dtype == value.dtype and tensor.shape == value.shape
            op_dtype = torch.float32 if key in COUNTERS else dtype
            assert_matches(tensor.cpu(), value.cpu(), op="optimizer", dtype=op_dtype)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("case", WITH_STOCK, **IDS)
def test_matches_stock(backend: str, case: OptimizerCase, dtype: torch.dtype) -> None:
    ours = parameters(dtype, shapes(backend))
    theirs = clones(ours)
    optimizer, stock = case.make(ours, backend=backend), case.make_stock(theirs)
    train(optimizer, ours)
    train(stock, theirs)
    assert_same_run(optimizer, ours, stock, theirs)


@pytest.mark.parametrize("options", [{}, TAIL], ids=["plain", "tail"])
@pytest.mark.parametrize("dtype", (*DTYPES[:4], torch.complex64), **IDS)
@pytest.mark.parametrize("case", ALL, **IDS)
def test_matches_the_reference(
    backend: str, case: OptimizerCase, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    ours = parameters(dtype, shapes(backend))
    optimizer = case.make(ours, backend=backend, **options)
    train(optimizer, ours, steps=2)
    copied = copy.deepcopy({"params": ours, "optimizer": optimizer})
    reference = copied["optimizer"]
    reference._backend = "reference"
    train(optimizer, ours, steps=1)
    train(reference, copied["params"], steps=1)
    assert_same_run(optimizer, ours, reference, copied["params"])
    if options:
        assert_matches(
            optimizer.grad_norm.cpu(),
            reference.grad_norm.cpu(),
            op="grad_norm",
            dtype=torch.float32 if dtype is torch.complex64 else dtype,
        )
        assert not any(param.grad is not None and param.grad.any() for param in ours)


@pytest.mark.parametrize("options", [{}, TAIL], ids=["plain", "tail"])
@pytest.mark.parametrize("kind", ["transposed", "sliced", "misaligned", "expanded gradient"])
def test_any_layout(backend: str, kind: str, options: dict[str, Any]) -> None:
    def make(device: str) -> Params:
        generator = torch.Generator().manual_seed(3)
        values = random((17, 40), torch.float32, generator).to(device)
        if kind == "transposed":
            return [torch.nn.Parameter(values.t()), torch.nn.Parameter(values[0].clone())]
        buffer = torch.full((17 * 60 + 8,), 7.0, device=device)
        if kind == "misaligned":
            view = buffer[1 : 1 + 17 * 40].view(17, 40)
        else:
            view = buffer[: 17 * 60].view(17, 60)[:, 3:43]
        view.copy_(values)
        param = torch.nn.Parameter(view)
        param.buffer = buffer  # type: ignore[attr-defined]
        return [param]

    ours, theirs = make(DEVICE), make(DEVICE)
    optimizer = ADAMW.make(ours, backend=backend, **options)
    reference = ADAMW.make(theirs, backend="reference", **options)
    for step in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            grad = torch.randn(mine.shape).to(DEVICE) * (step + 1)
            if kind == "expanded gradient":
                mine.grad, other.grad = grad[:1].expand(mine.shape), grad[:1].expand(mine.shape)
                other.grad = other.grad.contiguous()
            elif kind == "misaligned" and step == 1:
                mine.grad = torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view(grad.shape)
                other.grad = grad.clone()
            elif mine.dim() == 2 and step != 1:
                mine.grad, other.grad = grad.t().contiguous().t(), grad.clone()
            else:
                mine.grad, other.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
    assert_same_run(optimizer, ours, reference, theirs)
    if kind in ("sliced", "misaligned"):
        buffer, expected = ours[0].buffer, theirs[0].buffer  # type: ignore[attr-defined]
        outside = torch.ones_like(buffer, dtype=torch.bool)
        view = outside[1 : 1 + 680] if kind == "misaligned" else None
        if view is not None:
            view.fill_(False)
        else:
            outside[: 17 * 60].view(17, 60)[:, 3:43] = False
        assert (buffer[outside] == 7).all() and (expected[outside] == 7).all()


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, 0.0, float("inf"), float("-inf")])
def test_norm_types(backend: str, order: float) -> None:
    ours = [p for p in parameters(torch.float64, shapes(backend)) if p.numel()]
    theirs = clones(ours)
    for param, other in zip(ours, theirs, strict=True):
        param.grad = torch.randn(param.shape, dtype=torch.float64).to(DEVICE)
        other.grad = param.grad.clone()
    optimizer = ADAMW.make(ours, backend=backend, max_grad_norm=0.7, norm_type=order)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7, order)
    optimizer.step()
    assert optimizer.grad_norm.device == ours[0].device
    assert_matches(optimizer.grad_norm, norm, op="optimizer", dtype=torch.float64)
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine.grad, other.grad, op="optimizer", dtype=torch.float64)


def test_a_nonfinite_norm_raises_before_anything_changes(backend: str) -> None:
    params = parameters(torch.float32, shapes(backend))
    before = clones(params)
    optimizer = ADAMW.make(params, backend=backend, max_grad_norm=1.0, error_if_nonfinite=True)
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    with pytest.raises(RuntimeError, match="is non-finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("option", ["capturable", "fused"])
@pytest.mark.parametrize("case", [c for c in WITH_STOCK if c.stock is not torch.optim.SGD], **IDS)
def test_steps_counted_on_the_device(backend: str, case: OptimizerCase, option: str) -> None:
    if option not in inspect.signature(case.ours).parameters:
        pytest.skip(f"{case.ours.__name__} has no such option")
    ours = parameters(torch.float32, shapes(backend))
    theirs = clones(ours)
    optimizer, stock = case.make(ours, backend=backend, **{option: True}), case.make_stock(theirs)
    if case.stock is torch.optim.Adagrad and option == "fused" and not IS_SIMULATED:
        for params, each in ((ours, optimizer), (theirs, stock)):
            with pytest.raises(RuntimeError, match="fused=True"):
                train(each, params, steps=1)
        return
    train(optimizer, ours, steps=4)
    train(stock, theirs, steps=4)
    assert_same_run(optimizer, ours, stock, theirs)
    assert all(state["step"].device == ours[0].device for state in optimizer.state.values())


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:4], **IDS)
def test_a_product_as_a_checkpoint_leaves_it(
    backend: str, dtype: torch.dtype, capturable: bool
) -> None:
    """Torch moves all state but the step to the parameter, and to its dtype."""
    ours = parameters(dtype, shapes(backend))
    theirs = clones(ours)
    optimizer = NADAM.make(ours, backend=backend, capturable=capturable)
    stock = NADAM.make_stock(theirs)
    for _ in range(2):
        train(optimizer, ours, steps=3)
        train(stock, theirs, steps=3)
        optimizer.load_state_dict(optimizer.state_dict())
        stock.load_state_dict(stock.state_dict())
    assert_same_run(optimizer, ours, stock, theirs)


def test_scale_verdict_and_learning_rate_are_read_on_the_device(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "stays_on_device", lambda optimizer, verdict: True)
    params, plain = (parameters(torch.float32, shapes(backend)) for _ in range(2))
    lr = torch.tensor(0.01, device=DEVICE)
    optimizer = optim.AdamW(params, lr, capturable=True, max_grad_norm=1.0, backend=backend)
    stock = torch.optim.AdamW(plain, 0.01, foreach=False)
    for step in range(5):
        skipped = step in (0, 3)
        for param, other in zip(params, plain, strict=True):
            other.grad = torch.randn(other.shape).to(DEVICE)
            param.grad = other.grad * 8
        optimizer.grad_scale = torch.tensor(8.0, device=DEVICE)
        optimizer.found_inf = torch.tensor(float(skipped), device=DEVICE)
        before = clones(params)
        optimizer.step()
        if skipped:
            assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        else:
            torch.nn.utils.clip_grad_norm_(plain, 1.0)
            stock.step()
    assert optimizer.state[params[0]]["step"] == 3
    for mine, other in zip(params, plain, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=torch.float32)


@pytest.mark.parametrize("case", ALL, **IDS)
def test_hyperparameters_read_on_the_device(case: OptimizerCase, backend: str) -> None:
    ours = parameters(torch.float64, FEW_SHAPES)
    theirs = clones(ours)
    # The host may have to count with NAdam's momenta.
    most = 1 if case.ours is optim.NAdam else None
    optimizer = read_on_card(case.make(ours, backend=backend), most)
    reference = case.make(theirs, backend="reference")
    train(optimizer, ours, steps=2)
    train(reference, theirs, steps=2)
    assert_same_run(optimizer, ours, reference, theirs)


def test_more_tensors_than_one_launch_takes_and_several_groups(backend: str) -> None:
    count = 4100 if not IS_SIMULATED else 150  # 64 and 3968 fit a launch of CUDA
    if IS_SIMULATED and backend == "triton":
        count = 25
    ours = parameters(torch.float32, ((3,), (4099,), *((3,),) * count))  # one of two chunks
    theirs = clones(ours)

    def groups(params: Params) -> list[dict[str, Any]]:
        return [{"params": params[:20], "lr": 0.5}, {"params": params[20:]}]

    optimizer, stock = ADAMW.make(groups(ours), backend=backend), ADAMW.make_stock(groups(theirs))
    train(optimizer, ours, steps=2)
    train(stock, theirs, steps=2)
    assert_same_run(optimizer, ours, stock, theirs)


def test_parameters_at_different_steps_and_shared_memory(backend: str) -> None:
    buffer = torch.ones(64, device=DEVICE)
    ours = [torch.nn.Parameter(torch.ones(5, device=DEVICE)) for _ in range(3)]
    ours += [torch.nn.Parameter(buffer[:40]), torch.nn.Parameter(buffer[20:])]
    theirs = copy.deepcopy(ours)
    other_buffer = torch.ones(64, device=DEVICE)
    theirs[3:] = [torch.nn.Parameter(other_buffer[:40]), torch.nn.Parameter(other_buffer[20:])]
    optimizer, stock = ADAMW.make(ours, backend=backend, ema_decay=0.5), ADAMW.make_stock(theirs)
    for step in range(5):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            gone = step < index and index < 3
            mine.grad = None if gone else torch.full_like(mine, 1.0 + step)
            other.grad = None if gone else torch.full_like(other, 1.0 + step)
        optimizer.step()
        stock.step()
    assert_same_run(optimizer, ours, stock, theirs)


def test_moved_parameters_and_new_gradients_are_seen(backend: str) -> None:
    ours = parameters(torch.float32, shapes(backend))
    theirs = clones(ours)
    optimizer, stock = ADAMW.make(ours, backend=backend), ADAMW.make_stock(theirs)
    for _ in range(2):
        train(optimizer, ours, steps=2)
        train(stock, theirs, steps=2)
        for params in (ours, theirs):
            for param in params:
                param.data = param.data.clone()
    assert_same_run(optimizer, ours, stock, theirs)


def test_what_is_written_bumps_its_version(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = optim.SGD([param], lr=0.1, backend=backend, zero_grad_after_step=True)
    param.grad = torch.ones(3, device=DEVICE)
    versions = param._version, param.grad._version
    optimizer.step()
    assert param._version > versions[0] and param.grad._version > versions[1]


@pytest.mark.skipif(not IS_SIMULATED, reason="a card's order is its own")
def test_any_order_of_threads_and_blocks_gives_the_same_bits(card: Any) -> None:  # noqa: F811
    results = []
    for seed in range(5):
        card.native.set_seed(seed)
        params = parameters(torch.float32, ((9000,), (5,), (300, 3)))
        optimizer = ADAMW.make(params, backend="cuda", **TAIL)
        train(optimizer, params, steps=2)
        results.append([*params, *optimizer.ema_parameters(), optimizer.grad_norm])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_backend_refuses_what_it_cannot_step(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones(3, device=DEVICE).to_sparse()
    optimizer = optim.SGD([param], lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match=rf"backend .{backend}. cannot step .* layout"):
        optimizer.step()


def test_a_skipped_first_step_settles_nothing(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(deferred: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(operator, "stays_on_device", lambda optimizer, verdict: deferred)
        param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        options: dict[str, Any] = {"momentum": 0.9, "dampening": 0.5, "fused": True}
        optimizer = optim.SGD(
            [param], lr=0.1, ema_decay=0.9, zero_grad_after_step=True, backend=backend, **options
        )
        param.grad = torch.zeros(3, device=DEVICE)
        for step in range(5):
            param.grad += 1.0 + step
            optimizer.found_inf = torch.tensor(float(step in (0, 3)), device=DEVICE)
            optimizer.grad_scale = torch.tensor(1.0, device=DEVICE)
            optimizer.step()
            assert not param.grad.any()
        return [param.detach(), *optimizer.ema_parameters()]

    for left, right in zip(run(True), run(False), strict=True):
        assert_matches(left, right, op="optimizer", dtype=torch.float32)


def test_the_table_is_uploaded_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []
    upload = CardPlan._upload
    monkeypatch.setattr(CardPlan, "_upload", lambda plan: (uploads.append(1), upload(plan)))
    params = parameters(torch.float32, shapes(backend))
    optimizer = ADAMW.make(params, backend=backend)
    for _ in range(4):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert len(uploads) == 1


def test_what_triton_reads_is_uploaded_where_it_is_new() -> None:
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = optim.AdamW([param], fused=True, backend="triton")
    param.grad = torch.ones(3, device=DEVICE)
    seen = []
    for step in range(3):
        if step == 2:
            param.grad = torch.ones(4, device=DEVICE)[1:]
        optimizer.step()
        (plan,) = optimizer._plan._parts[0]._cards
        seen.append(plan._records.there)
    assert seen[1] is seen[0] and seen[2] is not seen[0]


def test_the_self_check_lets_right_kernels_in(backend: str) -> None:
    outcomes = selfcheck.run("optimizer_step", registry.BACKENDS[backend], torch.device(DEVICE))
    assert len(outcomes) >= 22 and not any(outcome.error for outcome in outcomes)

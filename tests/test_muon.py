"""Muon: stock's numbers and state, an iteration nearer to the exact one, bounded batches."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from cases import clones, parameters, train
from fastopt import optim
from fastopt.backends import newton_schulz, reference
from fastopt.backends.contract import MATRIX_RULES
from fastopt.backends.newton_schulz import Iteration
from tolerances import assert_as_near_as_stock, assert_matches

# Square, tall, wide, a row, a column, two of one shape, empty, and halved by symmetry.
SHAPES = ((24, 24), (96, 32), (32, 96), (1, 17), (17, 1), (32, 96), (24, 24), (0, 5))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"nesterov": False, "momentum": 0.8},
    {"adjust_lr_fn": "original", "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 8, "eps": 1e-3},
    {"lr": torch.tensor(0.02), "ns_steps": 0},
)
PRODUCTS = (torch.float32, torch.bfloat16)
DEFAULT = Iteration((3.4445, -4.775, 2.0315), 1e-7, 5)
IDS = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.fixture(params=PRODUCTS, **IDS)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What a processor without, and one with, hardware for bf16 products computes in."""
    dtype: torch.dtype = request.param
    monkeypatch.setattr(newton_schulz, "product_dtype", lambda device: dtype)
    return dtype


def exact(matrix: Tensor, iteration: Iteration = DEFAULT) -> Tensor:
    """The iteration on singular values: what it does is done to them alone."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm().clamp(min=iteration.eps)
    a, b, c = iteration.coefficients
    for _ in range(iteration.steps):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], **IDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_stock(options: dict[str, Any], dtype: torch.dtype, products: torch.dtype) -> None:
    ours = parameters(dtype, shapes=SHAPES)
    stock = clones(ours)
    options = {"lr": 0.02, **options}
    mine, theirs = optim.Muon(ours, **options), torch.optim.Muon(stock, **options)
    # Stock's momentum without Nesterov's is spoilt where it has the dtype of the products.
    steps = 1 if dtype is torch.bfloat16 and not options.get("nesterov", True) else 4
    train(mine, ours, steps=steps)
    train(theirs, stock, steps=steps)
    for param, other in zip(ours, stock, strict=True):
        assert_matches(param.detach(), other.detach(), op="muon", dtype=dtype)
        assert mine.state[param].keys() == theirs.state[other].keys()
        if steps > 1:
            for key, value in theirs.state[other].items():
                assert_matches(mine.state[param][key], value, op="optimizer", dtype=dtype)
    assert repr(mine) == repr(theirs)
    assert mine.defaults == theirs.defaults


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (1, 300), (1030, 1030)], **IDS)
def test_is_as_near_to_the_exact_iteration_as_stock(
    shape: tuple[int, int], products: torch.dtype
) -> None:
    matrices = [parameters(torch.float32, seed, (shape,))[0].detach() for seed in range(2)]
    ours = newton_schulz.orthogonalised(matrices, DEFAULT)
    assert ours.dtype is products
    for matrix, mine in zip(matrices, ours, strict=True):
        truth = exact(matrix)
        stock = torch.optim._muon._zeropower_via_newtonschulz(matrix, *DEFAULT[:1], 5, 1e-7)
        assert_as_near_as_stock(mine, stock, truth)
        if products is torch.float32:
            assert_matches(mine, truth.float(), op="newton_schulz", dtype=torch.float32)


@pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)], **IDS)
def test_singular_values_end_in_the_band_of_the_coefficients(
    shape: tuple[int, int], products: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(0.2, 1, 40)
    (result,) = newton_schulz.orthogonalised([(left * values) @ right], DEFAULT)
    ended = torch.linalg.svdvals(result.double())
    assert ended.min() > 0.6 and ended.max() < 1.3


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_low_rank_stays_low_rank(rank: int, products: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, rank, generator=generator) for n in (40, 100))
    matrix = left @ right.T
    (result,) = newton_schulz.orthogonalised([matrix], DEFAULT)
    stock = torch.optim._muon._zeropower_via_newtonschulz(matrix, *DEFAULT[:1], 5, 1e-7)
    if rank == 0:
        assert (result == 0).all()
    else:
        assert_as_near_as_stock(result, stock, exact(matrix))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_is_the_exact_iteration(options: dict[str, Any]) -> None:
    params = parameters(torch.float64, shapes=SHAPES)
    optimizer = optim.Muon(params, **{"lr": 0.02, **options}, backend="reference")
    group = optimizer.param_groups[0]
    iteration = Iteration(group["ns_coefficients"], group["eps"], group["ns_steps"])
    momenta = [torch.zeros_like(param) for param in params]
    for seed in range(3):
        expected = []
        for param, momentum, values in zip(
            params, momenta, parameters(torch.float64, seed, SHAPES), strict=True
        ):
            param.grad = values.detach()
            momentum.lerp_(param.grad, 1 - group["momentum"])
            ahead = param.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            lr = float(group["lr"])
            adjusted = torch.optim._muon._adjust_lr(lr, group["adjust_lr_fn"], param.shape)
            kept = 1 - lr * group["weight_decay"]
            expected.append(kept * param.detach() - adjusted * exact(ahead, iteration))
        optimizer.step()
        for param, value in zip(params, expected, strict=True):
            assert_matches(param.detach(), value, op="newton_schulz", dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], **IDS)
def test_decay_of_halves_is_torchs(dtype: torch.dtype) -> None:
    """Its factor, 0.99, is no number of either; without gradients there is nothing else."""
    ours = parameters(dtype, shapes=((40, 24), (7, 9)))
    stock = clones(ours)
    options = {"lr": 0.1, "weight_decay": 0.1}
    pairs = (optim.Muon(ours, **options), ours), (torch.optim.Muon(stock, **options), stock)
    for optimizer, params in pairs:
        for _ in range(3):
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
    for param, other in zip(ours, stock, strict=True):
        assert torch.equal(param, other)
    train(pairs[0][0], ours, steps=2)
    train(pairs[1][0], stock, steps=2)
    for param, other in zip(ours, stock, strict=True):
        assert_matches(param.detach(), other.detach(), op="muon", dtype=dtype)


def test_momentum_of_bf16_parameters_is_not_divided_by_its_norm() -> None:
    param = parameters(torch.bfloat16, shapes=((8, 12),))[0]
    optimizer = optim.Muon([param], nesterov=False)
    param.grad = torch.ones_like(param)
    optimizer.step()
    momentum = torch.zeros_like(param).lerp_(param.grad, 0.05)
    assert torch.equal(optimizer.state[param]["momentum_buffer"], momentum)


def test_batches_hold_what_is_alike_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    large = 4 * newton_schulz.BATCH_BYTES["cpu"]
    shapes = [(3, 4), (4, 3), (3, 4), (large, 1), (large, 1)]
    rows = [(torch.empty(shape),) for shape in shapes] + [(torch.empty(3, 4).double(),)]
    found = list(newton_schulz.batches(rows))
    assert [len(batch) for batch in found] == [2, 1, 1, 1, 1]
    assert {id(row) for batch in found for row in batch} == {id(row) for row in rows}
    # A matrix is treated alike, whoever is iterated beside it, but for the order of a few sums.
    matrices = [p.detach() for p in parameters(torch.float32, shapes=((30, 50),) * 3)]
    together = newton_schulz.orthogonalised(matrices, DEFAULT)
    for matrix, result in zip(matrices, together, strict=True):
        (alone,) = newton_schulz.orthogonalised([matrix], DEFAULT)
        op = "newton_schulz" if alone.dtype is torch.float32 else "muon"
        assert_matches(alone.float(), result.float(), op=op, dtype=torch.float32)


def test_symmetric_products_are_products() -> None:
    factor = torch.randn(2, 1031, 40, dtype=torch.float64)
    result = newton_schulz._symmetric_product(factor, factor.mT)
    assert_matches(result, factor @ factor.mT, op="newton_schulz", dtype=torch.float64)


def test_autocast_changes_nothing(products: torch.dtype) -> None:
    matrices = [p.detach() for p in parameters(torch.float32, shapes=((30, 50), (30, 50)))]
    outside = newton_schulz.orthogonalised(matrices, DEFAULT)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(newton_schulz.orthogonalised(matrices, DEFAULT), outside)


def test_without_elements_there_is_nothing_to_do() -> None:
    param = torch.nn.Parameter(torch.ones(5, 0))  # stock divides by its columns
    param.grad = torch.ones(5, 0)
    optim.Muon([param]).step()


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts(layout: str) -> None:
    values = parameters(torch.float32, shapes=((40, 24),))[0].detach()
    truth = torch.nn.Parameter(values.clone())
    wide = torch.full((40, 30), 7.0)
    view = values.T.contiguous().T if layout == "transposed" else wide[:, 3:27].copy_(values)
    param = torch.nn.Parameter(view)
    optimizers = optim.Muon([param], lr=0.1), optim.Muon([truth], lr=0.1)
    for seed in range(3):
        grad = parameters(torch.float32, seed, ((40, 24),))[0].detach()
        param.grad, truth.grad = grad.T.contiguous().T, grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_matches(param.detach(), truth.detach(), op="muon", dtype=torch.float32)
    assert layout == "transposed" or ((wide[:, :3] == 7).all() and (wide[:, 27:] == 7).all())


def test_options_of_every_optimizer() -> None:
    ours, truth = (parameters(torch.float32, shapes=((12, 20), (20, 12))) for _ in range(2))
    options = {"lr": 0.1, "max_grad_norm": 0.5, "clip_value": 0.05, "ema_decay": 0.5}
    optimizer = optim.Muon(ours, **options, zero_grad_after_step=True)
    stock = torch.optim.Muon(truth, lr=0.1)
    averages = []
    for seed in range(3):
        for params in (ours, truth):
            for param, values in zip(
                params, parameters(torch.float32, seed, ((12, 20), (20, 12))), strict=True
            ):
                param.grad = values.detach()
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(truth, 0.5)
        torch.nn.utils.clip_grad_value_(truth, 0.05)
        stock.step()
        assert_matches(optimizer.grad_norm, norm, op="grad_norm", dtype=torch.float32)
        assert all(not param.grad.any() for param in ours)
        new = [param.detach().clone() for param in truth]
        averages = [a.lerp(b, 0.5) for a, b in zip(averages or new, new, strict=True)]
    for param, other, average in zip(ours, truth, averages, strict=True):
        assert_matches(param.detach(), other.detach(), op="muon", dtype=torch.float32)
        assert_matches(optimizer.state[param]["ema"], average, op="muon", dtype=torch.float32)


def test_gradient_scaler() -> None:
    ours, truth = (parameters(torch.float32, shapes=((12, 20),)) for _ in range(2))
    optimizer, stock = optim.Muon(ours, lr=0.1), torch.optim.Muon(truth, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        scaler.scale((ours[0] * torch.arange(20)).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != float("inf"):
            stock.zero_grad()
            ((truth[0] * torch.arange(20)).square().sum() * factor).backward()
            stock.step()
    assert_matches(ours[0].detach(), truth[0].detach(), op="muon", dtype=torch.float32)


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_checkpoints_move(direction: str) -> None:
    params, truth = (parameters(torch.float32, shapes=SHAPES) for _ in range(2))
    stock = torch.optim.Muon(truth, lr=0.02)
    train(stock, truth, steps=3)
    train(stock, truth, steps=3, seed=2)
    classes = (optim.Muon, torch.optim.Muon)
    first, second = classes if direction == "to torch" else classes[::-1]
    optimizer = first(params, lr=0.02)
    train(optimizer, params, steps=3)
    checkpoint = io.BytesIO()
    torch.save(optimizer.state_dict(), checkpoint)
    checkpoint.seek(0)
    optimizer = second(params, lr=0.5)
    optimizer.load_state_dict(torch.load(checkpoint, weights_only=True))
    train(optimizer, params, steps=3, seed=2)
    for param, other in zip(params, truth, strict=True):
        assert_matches(param.detach(), other.detach(), op="muon", dtype=torch.float32)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on(copier: Any) -> None:
    params = parameters(torch.float32, shapes=SHAPES)
    optimizer = optim.Muon(params, lr=0.02, ema_decay=0.9)
    train(optimizer, params, steps=2)
    copied = copier(optimizer)
    train(optimizer, params, steps=2, seed=5)
    train(copied, copied.param_groups[0]["params"], steps=2, seed=5)
    for mine, other in zip(params, copied.param_groups[0]["params"], strict=True):
        assert torch.equal(mine, other)


def test_closure_and_groups() -> None:
    params = parameters(torch.float32, shapes=((4, 6), (6, 4)))
    optimizer = optim.Muon([{"params": params[:1]}, {"params": params[1:], "ns_steps": 3}])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_what_is_no_matrix_is_refused() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    text = r"Muon only supports 2D parameters whereas we found a parameter with size: .*\[2\]"
    for cls in (optim.Muon, torch.optim.Muon):
        with pytest.raises(ValueError, match=text):
            cls([matrix, vector])
    optimizer = optim.Muon([matrix])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [vector]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 2))]})


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"momentum": -1.0},
        {"weight_decay": -1.0},
        {"adjust_lr_fn": "other"},
    ],
    ids=str,
)
def test_errors_are_torchs(options: dict[str, Any]) -> None:
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    texts = []
    for cls in (optim.Muon, torch.optim.Muon):
        with pytest.raises(ValueError) as caught:
            cls([matrix], **options)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_errors_of_torchs_own_tests() -> None:
    pytest.importorskip("expecttest", reason="torch's test utilities need it")
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = [info for info in optim_db if info.optim_cls is torch.optim.Muon]
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        if issubclass(error.error_type, Warning):
            continue
        config = error.optimizer_error_input
        for cls in (torch.optim.Muon, optim.Muon):
            with pytest.raises(error.error_type, match=error.error_regex):
                cls(config.params, **config.kwargs).step()


@pytest.mark.parametrize("options", [{"ns_steps": 100}, {"ns_coefficients": (1.0, 2.0)}], ids=str)
def test_errors_of_a_step_are_torchs_and_change_nothing(options: dict[str, Any]) -> None:
    texts = []
    for cls in (optim.Muon, torch.optim.Muon):
        matrix = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = cls([matrix], **options)
        matrix.grad = torch.ones(2, 2)
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        texts.append(str(caught.value))
        assert (matrix == 1).all()
        assert cls is torch.optim.Muon or not optimizer.state
    assert texts[0] == texts[1]


def test_complex_and_sparse_are_refused_as_by_torch() -> None:
    for grad in (torch.ones(2, 2, dtype=torch.complex64), torch.eye(2).to_sparse()):
        texts = []
        for cls in (optim.Muon, torch.optim.Muon):
            matrix = torch.nn.Parameter(torch.ones(2, 2, dtype=grad.dtype))
            matrix.grad = grad
            with pytest.raises(RuntimeError) as caught:
                cls([matrix]).step()
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


class Wrapped(Tensor):
    """A subclass that nothing is known of."""


def test_subclasses_are_torchs() -> None:
    values = torch.randn(6, 8)
    ours, truth = (torch.nn.Parameter(values.clone().as_subclass(Wrapped)) for _ in range(2))
    optimizers = optim.Muon([ours], lr=0.1), torch.optim.Muon([truth], lr=0.1)
    for param, optimizer in zip((ours, truth), optimizers, strict=True):
        param.grad = torch.ones(6, 8).as_subclass(Wrapped)
        optimizer.step()
    assert torch.equal(ours, truth)


def test_says_who_steps(caplog: pytest.LogCaptureFixture) -> None:
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    matrix.grad = torch.ones(2, 2)
    optimizer = optim.Muon([matrix])
    optimizer.step()
    assert not caplog.records
    (row,) = fastopt.explain(optimizer).parameters
    assert row.backend == "torch" and not row.reasons
    for backend in ("cpu", "cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot step"):
            optim.Muon([matrix], backend=backend).step()


def test_compiled_step() -> None:
    params, truth = (parameters(torch.float32, shapes=((4, 6), (6, 4))) for _ in range(2))
    optimizers = optim.Muon(params, lr=0.1), torch.optim.Muon(truth, lr=0.1)
    compiled = torch.compile(optimizers[0].step, backend="eager")
    for seed in range(2):
        for tensors in (params, truth):
            for param, values in zip(
                tensors, parameters(torch.float32, seed, ((4, 6), (6, 4))), strict=True
            ):
                param.grad = values.detach()
        compiled()
        optimizers[1].step()
    for param, other in zip(params, truth, strict=True):
        assert_matches(param.detach(), other.detach(), op="muon", dtype=torch.float32)


def test_rules_are_the_references() -> None:
    assert set(MATRIX_RULES) <= set(reference.RULES)

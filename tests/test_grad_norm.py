"""``fastopt.nn.utils``: torch's numbers, dtypes, errors and warnings."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import fastopt
from cases import clones, parameters, random
from fastopt.nn import utils
from tolerances import assert_matches

stock = torch.nn.utils
IDS = {"ids": lambda value: str(value).removeprefix("torch.")}
REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDERS = (2, 1, 0, 3, 0.5, -1, math.inf, -math.inf, "inf")


def with_gradients(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [param for param in parameters(dtype) if param.numel()]
    for index, param in enumerate(params):
        if index % 4 != 2:
            param.grad = random(tuple(param.shape), dtype, generator)
    return params


def twins(dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    return with_gradients(dtype), with_gradients(dtype)


def assert_same_gradients(
    ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], dtype: torch.dtype
) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            assert_matches(mine.grad, other.grad, op="grad_norm", dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", (*REAL_DTYPES, torch.complex64), **IDS)
def test_clip_grad_norm(dtype: torch.dtype, order: float) -> None:
    for max_norm in (0.5, 1e6):
        ours, theirs = twins(dtype)
        norm = utils.clip_grad_norm_(ours, max_norm, order)
        expected = stock.clip_grad_norm_(theirs, max_norm, float(order))
        assert norm.dtype == expected.dtype and norm.shape == expected.shape
        assert_matches(norm, expected, op="grad_norm", dtype=dtype)
        assert_same_gradients(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", REAL_DTYPES, **IDS)
def test_the_norm_is_exact_but_for_its_last_rounding(dtype: torch.dtype) -> None:
    grads = [param.grad for param in with_gradients(dtype) if param.grad is not None]
    truth = torch.cat([grad.double().flatten() for grad in grads]).norm().to(dtype)
    assert_matches(utils.get_total_norm(grads), truth, op="rounded once", dtype=dtype)


def test_large_values_do_not_overflow() -> None:
    assert utils.get_total_norm([torch.full((4,), 1e25)]) == 2e25


@pytest.mark.parametrize("dtype", REAL_DTYPES, **IDS)
def test_clip_grad_value_and_with_norm(dtype: torch.dtype) -> None:
    ours, theirs = twins(dtype)
    for limit in (0.3, -0.1):
        utils.clip_grad_value_(ours, limit)
        stock.clip_grad_value_(theirs, limit)
    assert_same_gradients(ours, theirs, dtype)
    norm = torch.tensor(7.0, dtype=dtype)
    utils.clip_grads_with_norm_(iter(ours), 1.0, norm)
    stock.clip_grads_with_norm_(theirs, 1.0, norm)
    assert_same_gradients(ours, theirs, dtype)


def test_nonfinite() -> None:
    for value in (math.inf, math.nan):
        ours, theirs = twins(torch.float32)
        for params in (ours, theirs):
            params[0].grad.fill_(value)
        before = [None if p.grad is None else p.grad.clone() for p in ours]
        with pytest.raises(RuntimeError) as expected:
            stock.clip_grad_norm_(theirs, 1.0, error_if_nonfinite=True)
        with pytest.raises(RuntimeError) as raised:
            utils.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
        assert str(raised.value) == str(expected.value)
        with pytest.raises(RuntimeError):
            utils.get_total_norm([p.grad for p in ours if p.grad is not None], 2.0, True)
        for param, old in zip(ours, before, strict=True):
            assert old is None or torch.equal(param.grad.nan_to_num(3), old.nan_to_num(3))
        utils.clip_grad_norm_(ours, 1.0)
        stock.clip_grad_norm_(theirs, 1.0)
        assert_same_gradients(ours, theirs, torch.float32)


def test_one_tensor_none_and_generators() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    assert utils.clip_grad_norm_(param, 1.0) == stock.clip_grad_norm_(param, 1.0) == 0
    assert utils.get_total_norm([]) == 0 and utils.clip_grad_norm_([], 1.0).dtype == torch.float32
    param.grad = torch.full((3,), 2.0)
    assert math.isclose(utils.clip_grad_norm_(param, 1.0).item(), math.sqrt(12), rel_tol=1e-6)
    assert utils.get_total_norm(torch.ones(4)) == 2
    with pytest.warns(UserWarning, match="`parameters` is an empty generator"):
        utils.clip_grad_norm_((p for p in ()), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        utils.clip_grad_norm_((p for p in (param,)), 1.0)


KINDS = ("transposed", "sliced", "expanded", "same twice", "sparse", "neg")


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str) -> None:
    def make() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(torch.zeros(30, 50)), torch.nn.Parameter(torch.zeros(700))]
        grad = random((30, 50), torch.float32, generator)
        params[1].grad = random((700,), torch.float32, generator)
        if kind == "transposed":
            grad = grad.t().contiguous().t()
        elif kind == "sliced":
            params[0].buffer = buffer = torch.full((60, 70), 5.0)  # type: ignore[attr-defined]
            buffer[::2, 7:57] = grad
            grad = buffer[::2, 7:57]
        elif kind == "sparse":
            grad = grad.relu().to_sparse().coalesce()
        elif kind == "neg":
            grad = torch._neg_view(grad)
        params[0].grad = grad
        return params

    ours, theirs = make(), make()
    if kind == "expanded":
        for params in (ours, theirs):
            params[0].grad = torch.ones(1, 50).expand(30, 50)
        assert_matches(
            utils.get_total_norm([ours[0].grad]),
            torch.tensor(math.sqrt(1500)),
            op="grad_norm",
            dtype=torch.float32,
        )
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            utils.clip_grad_norm_(ours, 1.0)
        return
    if kind == "same twice":
        ours, theirs = ours + ours[:1], theirs + theirs[:1]
    try:
        expected = stock.clip_grad_norm_(theirs, 1.0)
    except (NotImplementedError, RuntimeError) as error:  # sparse ones before torch 2.14, say
        with pytest.raises(type(error)):
            utils.clip_grad_norm_(ours, 1.0)
        return
    norm = utils.clip_grad_norm_(ours, 1.0)
    assert_matches(norm, expected, op="grad_norm", dtype=torch.float32)
    for mine, other in zip(ours, theirs, strict=True):
        pair = [g.to_dense() if g.is_sparse else g for g in (mine.grad, other.grad)]
        assert_matches(*pair, op="grad_norm", dtype=torch.float32)
    if kind == "sliced":
        buffer = ours[0].buffer  # type: ignore[attr-defined]
        assert (buffer[1::2] == 5).all() and (buffer[:, :7] == 5).all()


def test_mixed_dtypes_promote() -> None:
    grads = [torch.ones(3, dtype=dtype) for dtype in REAL_DTYPES]
    norm = utils.get_total_norm(grads)
    assert norm.dtype == torch.float64 and math.isclose(norm, math.sqrt(12))


def test_what_is_written_bumps_its_version() -> None:
    params = with_gradients(torch.float32)
    versions = [param.grad._version for param in params if param.grad is not None]
    utils.clip_grad_norm_(params, 0.1)
    grads = [param.grad for param in params if param.grad is not None]
    assert all(grad._version > old for grad, old in zip(grads, versions, strict=True))
    with torch.inference_mode():
        grad = torch.ones(4)
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = grad
    with torch.inference_mode():
        utils.clip_grad_norm_([param], 0.5)
    assert torch.allclose(grad, torch.full((4,), 0.25))


def test_threads_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [random((n,), torch.float32, generator) for n in (100_003, 5, 40_000)]
    norms: list[Tensor] = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        norms.append(utils.get_total_norm(grads))
    assert norms[0] == norms[1] == norms[2]


def test_the_backend_is_the_users_choice() -> None:
    with fastopt.use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' cannot"):
        utils.get_total_norm([torch.eye(3).to_sparse()])
    dense = clones(with_gradients(torch.float32))
    with fastopt.use_backend("torch"):
        utils.clip_grad_norm_(dense, 1.0)


def test_compiled() -> None:
    ours, theirs = twins(torch.float32)
    clip = torch.compile(lambda params: utils.clip_grad_norm_(params, 0.5), backend="eager")
    norm, expected = clip(ours), stock.clip_grad_norm_(theirs, 0.5)
    assert_matches(norm, expected, op="grad_norm", dtype=torch.float32)
    torch._dynamo.reset()
    assert_same_gradients(ours, theirs, torch.float32)

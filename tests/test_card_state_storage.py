"""A card's kernels of state that is not stored in the parameter's dtype: the CPU's bits.

Rates and weights are powers of two here, and gradients have few bits: whether a product and a sum
are rounded once or twice, the result is the same, and so are random numbers, codes and remainders.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cards import CARD_BACKENDS, DEVICE, IS_SIMULATED, card, over_cards  # noqa: F401
from cases import StoredCase
from fastopt import optim
from fastopt.ops import optimizer_step as operator

pytestmark = pytest.mark.usefixtures("card")

SHAPES = ((1,), (255,), (256,), (257,), (0,), (4095,), (4096,), (4097,), (70000,), (64, 80))
FEW_SHAPES = ((0,), (257,), (4097,))
TAIL = {"clip_value": 1.0, "zero_grad_after_step": True, "ema_decay": 0.5}
Params = list[torch.nn.Parameter]

MAKERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda params, **more: optim.SGD(params, lr=2**-4, **more),
    "momentum": lambda params, **more: optim.SGD(params, lr=2**-4, momentum=0.5, **more),
    "Nesterov": lambda params, **more: optim.SGD(
        params, lr=2**-4, momentum=0.5, nesterov=True, maximize=True, **more
    ),
    "Lion": lambda params, **more: optim.Lion(params, lr=2**-6, betas=(0.5, 0.75), **more),
    "Adam": lambda params, **more: optim.Adam(
        params, lr=2**-4, betas=(0.5, 0.5), eps=0.0, **more
    ),
    "amsgrad": lambda params, **more: optim.Adam(
        params, lr=2**-4, betas=(0.5, 0.5), eps=0.0, amsgrad=True, **more
    ),
}  # fmt: skip
DIVIDES = ("Adam", "amsgrad")  # on a card Triton divides less exactly


def make(case: StoredCase, params: Params, backend: str, **more: Any) -> Any:
    return MAKERS[case.maker](
        params, backend=backend, state_storage=case.storage, param_precision=case.precision,
        min_8bit_size=200, rounding_seed=2**40 + 7, **case.tail, **more,
    )  # fmt: skip


CASES = [
    StoredCase(maker, dtype, storage, precision, tail)
    for maker in MAKERS
    for dtype, storage, precision in (
        (torch.float32, "bf16", None),
        (torch.float32, "8bit", None),
        (torch.float16, "fp32", None),
        (torch.float16, "bf16", None),
        (torch.float16, "8bit", None),
        *itertools.product(
            [torch.bfloat16],
            ("bf16", "8bit", "fp32", None),
            ("stochastic", "kahan", "master", None),
        ),
    )
    if storage or precision
    for tail in ({}, TAIL)
]
MOMENTUM_8BIT = StoredCase("momentum", torch.bfloat16, "8bit", "stochastic", {})


def device_of(backend: str) -> str:
    return DEVICE if backend in CARD_BACKENDS else "cpu"


def parameters(case: StoredCase, backend: str, shapes: tuple[tuple[int, ...], ...]) -> Params:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
    return [torch.nn.Parameter(value.to(device_of(backend))) for value in values]


def gradient(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Whole numbers of 1/128 other than zero, which any dtype holds."""
    size = torch.randint(1, 256, shape, generator=generator) / 128
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -size, size).to(dtype)


def train(optimizer: Any, params: Params, steps: int = 3) -> None:
    """The last parameter misses a step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for param in params:
            grad = gradient(param.shape, param.dtype, generator)
            param.grad = grad.to(param.device)
        if step == 1:
            params[-1].grad = None
        optimizer.step()


def everything(optimizer: Any, params: Params) -> list[Tensor]:
    found = []
    for param in params:
        grads = [] if param.grad is None else [param.grad]
        found += [param.detach(), *grads, *optimizer.state[param].values()]
    return [tensor.clone().cpu() for tensor in found]  # both lie as copies do


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == right.dtype and left.stride() == right.stride()
        assert torch.equal(left, right)


def assert_as_on_the_cpu(case: StoredCase, backend: str, *shapes: tuple[int, ...]) -> None:
    results = []
    for where in (backend, "cpu"):
        params = parameters(case, where, shapes)
        optimizer = make(case, params, where)
        train(optimizer, params)
        results.append(everything(optimizer, params))
    assert_same_bits(*results)


@over_cards("case", CASES, sample=11)
def test_the_bits_are_those_of_the_cpu(backend: str, case: StoredCase) -> None:
    if backend == "triton" and not IS_SIMULATED and case.maker in DIVIDES:
        pytest.skip("Triton divides less exactly")
    few = IS_SIMULATED and backend == "triton"
    assert_as_on_the_cpu(case, backend, *(FEW_SHAPES if few else SHAPES))


@pytest.mark.parametrize("backend", CARD_BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "misaligned", "strided gradient"])
@pytest.mark.parametrize("tail", [{}, TAIL], ids=["plain", "tail"])
def test_any_dense_layout_of_parameters_and_any_of_gradients(
    backend: str, layout: str, tail: dict[str, Any]
) -> None:
    case = StoredCase("momentum", torch.bfloat16, "8bit", "master", tail)
    results = []
    for where in (backend, "cpu"):
        device = device_of(where)
        generator = torch.Generator().manual_seed(2)
        values = torch.randn(30, 40, generator=generator).to(device, case.dtype)
        if layout == "transposed":
            param = torch.nn.Parameter(values.t())
        elif layout == "misaligned":
            buffer = torch.zeros(1201, dtype=case.dtype, device=device)
            param = torch.nn.Parameter(buffer[1:].view(30, 40).copy_(values))
        else:
            param = torch.nn.Parameter(values)
        optimizer = make(case, [param], where)
        for _ in range(3):
            grad = gradient(param.shape, case.dtype, generator).to(device)
            if layout == "strided gradient":
                param.grad = torch.stack([grad, grad], -1)[..., 0]
            elif layout == "misaligned":
                param.grad = torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view(30, 40)
            else:
                param.grad = grad
            optimizer.step()
        results.append(everything(optimizer, [param]))
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", CARD_BACKENDS)
@pytest.mark.parametrize("counted_on_card", [False, True])
def test_a_skipped_step_draws_and_counts_nothing(
    backend: str, counted_on_card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if counted_on_card and backend == "triton" and not IS_SIMULATED:
        pytest.skip("Triton divides less exactly")
    monkeypatch.setattr(operator, "stays_on_device", lambda optimizer, verdict: counted_on_card)
    maker, more = ("Adam", {"capturable": True}) if counted_on_card else ("Lion", {})
    case = StoredCase(maker, torch.bfloat16, "bf16", "stochastic", {"zero_grad_after_step": True})
    results = []
    for where, verdicts in ((backend, (1, 0, 1, 0)), ("cpu", (0, 0))):
        generator = torch.Generator().manual_seed(3)
        params = parameters(case, where, ((700,),))
        optimizer = make(case, params, where, **(more if where == backend else {}))
        for verdict in verdicts:
            device = params[0].device
            if verdict:
                params[0].grad = torch.full_like(params[0], float("inf"))
            else:
                params[0].grad = gradient(params[0].shape, case.dtype, generator).to(device)
            optimizer.grad_scale = torch.tensor(1.0, device=device)
            optimizer.found_inf = torch.tensor(float(verdict), device=device)
            optimizer.step()
            assert not params[0].grad.any()
        results.append(everything(optimizer, params))
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_more_tensors_than_one_launch_takes_and_several_storages(backend: str) -> None:
    """448 coded ones fit a launch of CUDA; small ones are in fp32, which is another launch."""
    count = 470 if backend == "cuda" else 6
    assert_as_on_the_cpu(MOMENTUM_8BIT, backend, (300,), *((3,),) * count, (257,))


@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_averages_of_parameters_without_gradients(backend: str) -> None:
    case = StoredCase("momentum", torch.bfloat16, "8bit", "master", {"ema_decay": 0.5})
    results = []
    for where in (backend, "cpu"):
        params = parameters(case, where, ((300,), (520,)))
        optimizer = make(case, params, where)
        train(optimizer, params, steps=1)
        for _ in range(2):
            params[0].grad = None
            params[1].grad = torch.ones_like(params[1])
            optimizer.step()
        results.append(everything(optimizer, params))
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_a_nan_stays_in_its_block_and_an_infinity_too(backend: str) -> None:
    for value in (float("nan"), float("inf")):
        param = torch.nn.Parameter(torch.ones(1000, device=DEVICE))
        param.grad = torch.ones_like(param)
        param.grad[300] = value
        optimizer = optim.AdamW([param], state_storage="8bit", min_8bit_size=0, backend=backend)
        optimizer.step()
        optimizer.step()
        assert param[:256].isfinite().all() and param[512:].isfinite().all()
        assert not param[300].isfinite()


@pytest.mark.skipif(not IS_SIMULATED, reason="a card's order is its own")
def test_any_order_of_threads_and_blocks_gives_the_same_bits(card: Any) -> None:  # noqa: F811
    results = []
    for seed in range(4):
        card.native.set_seed(seed)
        params = parameters(MOMENTUM_8BIT, "cuda", ((9000,), (5,), (300, 3)))
        optimizer = optim.AdamW(
            params, state_storage="8bit", min_8bit_size=0, param_precision="stochastic",
            backend="cuda", **TAIL,
        )  # fmt: skip
        train(optimizer, params, steps=2)
        results.append(everything(optimizer, params))
    for other in results[1:]:
        assert_same_bits(results[0], other)

"""The LSTM against stock torch and against double precision: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from lstm_cases import (
    LAYOUTS,
    LOSSES,
    LstmCase,
    assert_no_worse,
    assert_same,
    exact,
    forward,
    gradients,
    run,
    weighted,
)

WIDE = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)
NAMED = {"ids": lambda value: value.name if isinstance(value, LstmCase) else str(value)}

STACK: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "no bias": {"num_layers": 2, "bias": False},
    "bidirectional": {"bidirectional": True},
    "batch first": {**STACK, "batch_first": True},
    "projection": {**STACK, "proj_size": 4},
    "projection, batch first, no bias": {"proj_size": 7, "batch_first": True, "bias": False},
    "no bias in both directions": {**STACK, "bias": False},
}
SHAPES: dict[str, dict[str, Any]] = {
    "padded": {},
    "states": {"initial": True},
    "unbatched": {"batch": None},
    "unbatched with states": {"batch": None, "initial": True},
    "one step": {"seq_len": 1, "initial": True},
    "one sequence": {"batch": 1, "initial": True},
    "one step of one sequence": {"seq_len": 1, "batch": 1},
    "sorted": {"batch": 4, "lengths": (6, 5, 5, 2), "initial": True},
    "unsorted": {"batch": 5, "lengths": (2, 6, 1, 6, 3), "initial": True},
    "unsorted, no states": {"batch": 3, "lengths": (1, 1, 4), "seq_len": 4},
    "equal lengths": {"batch": 3, "lengths": (6, 6, 6)},
}
GRID = [
    LstmCase(f"{option}-{shape}", options=options, **shapes)
    for option, options in OPTIONS.items()
    for shape, shapes in SHAPES.items()
]
NARROW_GRID = [
    LstmCase(f"{option}-{shape}", 21, 37, options=options, **SHAPES[shape])
    for option, options in OPTIONS.items()
    for shape in ("states", "unbatched with states", "unsorted")
]
SIZES = [
    LstmCase(f"I{inputs}-H{hidden}", inputs, hidden, {"bidirectional": hidden < 64}, 5, 4)
    for hidden in (1, 3, 17, 33, 64, 100, 250)
    for inputs in (1, 5, 128)
]
BATCHES = [LstmCase(f"B{size}", 9, 40, STACK, 3, size) for size in (2, 7, 16, 33, 65)]
LAID_OUT = [
    LstmCase(f"{layout}-{order}", options=options, initial=True, layout=layout)
    for layout in LAYOUTS
    for order, options in {"time first": STACK, "batch first": OPTIONS["batch first"]}.items()
]
# Large enough for the largest error of a tensor to say something.
SHARP = [
    LstmCase("one layer", 24, 64, {}, 12, 8, initial=True),
    LstmCase("odd", 31, 45, STACK, 9, 6),
    LstmCase("projection", 24, 64, {**STACK, "proj_size": 20}, 8, 6, initial=True),
    LstmCase("packed", 24, 48, STACK, 9, 6, (3, 9, 1, 7, 7, 2), initial=True),
    LstmCase("long", 8, 32, {}, 80, 6),
]
DROPPED = [
    LstmCase("padded", options={"num_layers": 3, "dropout": 0.4}, initial=True),
    LstmCase("batch first", options={**OPTIONS["batch first"], "dropout": 0.5}),
    LstmCase("projection", options={**OPTIONS["projection"], "dropout": 0.5}),
    LstmCase("unbatched", options={**STACK, "dropout": 0.5}, batch=None),
    LstmCase("packed", options={**STACK, "dropout": 0.3}, lengths=(3, 6, 2)),
    LstmCase("everything", options={"num_layers": 2, "dropout": 1.0}),
]


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan() -> Iterator[None]:
    """Whatever an operator forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(
    case: LstmCase, dtype: torch.dtype, loss: str = "all", *, device: str = "cpu", **more: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our results on a device and stock's on the CPU; ``more`` is for our module."""
    ours, stock = case.pair(dtype, device=device, **more)
    return run(ours, case.sample(dtype).to(device), loss), run(stock, case.sample(dtype), loss)


def check(case: LstmCase, dtype: torch.dtype, loss: str = "all", **more: Any) -> None:
    assert_same(*both(case, dtype, loss, **more), dtype)


def check_error(case: LstmCase, dtype: torch.dtype, **more: Any) -> None:
    assert_no_worse(*both(case, dtype, **more), exact(case, dtype))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", GRID + SIZES + BATCHES + LAID_OUT, **NAMED)
def test_outputs_and_gradients_are_stocks(case: LstmCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", SHARP, **NAMED)
def test_error_is_at_most_twice_stocks(case: LstmCase, dtype: torch.dtype) -> None:
    check_error(case, dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", NARROW_GRID + LAID_OUT, **NAMED)
def test_half_precision_is_no_worse_than_stocks(case: LstmCase, dtype: torch.dtype) -> None:
    check_error(case, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", ["two layers", "batch first", "projection"])
def test_outputs_that_the_loss_does_not_use(options: str, loss: str, dtype: torch.dtype) -> None:
    check(LstmCase(options, options=OPTIONS[options], initial=True), dtype, loss)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("loss", ["output", "h_n", "c_n"])
def test_a_packed_loss_that_uses_one_output(loss: str, dtype: torch.dtype) -> None:
    check(LstmCase("packed", options=STACK, lengths=(2, 6, 1), initial=True), dtype, loss)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", DROPPED, **NAMED)
def test_dropout_between_layers_draws_stocks_mask(case: LstmCase, dtype: torch.dtype) -> None:
    results, states = [], []
    for lstm in case.pair(dtype):
        sample = case.sample(dtype)
        torch.manual_seed(4)
        results.append(run(lstm, sample))
        states.append(torch.get_rng_state())
    assert_same(*results, dtype)
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", DROPPED, **NAMED)
def test_evaluation_drops_nothing(case: LstmCase, dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    pair = case.pair(dtype)
    torch.set_rng_state(before)
    actual, expected = (run(lstm.eval(), case.sample(dtype)) for lstm in pair)
    assert_same(actual, expected, dtype)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", NARROW_GRID, **NAMED)
def test_inference(case: LstmCase, mode: type[AbstractContextManager[None]]) -> None:
    ours, stock = case.pair(torch.float32)
    with mode():
        actual, expected = (forward(m, case.sample(torch.float32)) for m in (ours, stock))
    assert_same(actual, expected, torch.float32)
    for name, value in expected.items():
        assert actual[name].is_inference() == value.is_inference()
        assert not actual[name].requires_grad


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="stock's autocast needs bf16 in oneDNN"
)
@pytest.mark.parametrize("case", SHARP, **NAMED)
def test_autocast(case: LstmCase) -> None:
    results = []
    for lstm in case.pair(torch.float32, backend=None):
        sample = case.sample(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = forward(lstm, sample)
        weighted([outputs["output"], outputs["h_n"], outputs["c_n"]]).backward()
        results.append(outputs | gradients(lstm, sample))
    assert_no_worse(*results, exact(case, torch.float32))

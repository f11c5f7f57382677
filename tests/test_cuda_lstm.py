"""The LSTM's CUDA kernels: stock's numbers, on a card or on the host simulator."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from cards import DEVICE, IS_SIMULATED, card  # noqa: F401
from fastopt.backends import cuda_lstm, registry, selfcheck
from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda import CudaBackend
from lstm_cases import LOSSES, LstmCase, assert_no_worse, assert_same, exact, forward, run, weighted
from test_lstm_parity import (
    DROPPED,
    GRID,
    LAID_OUT,
    NAMED,
    NARROW,
    NARROW_GRID,
    OPTIONS,
    SHARP,
    STACK,
    WIDE,
    _uninitialized_memory_is_nan,  # noqa: F401
    both,
    check,
    check_error,
)
from tolerances import assert_as_near_as_tf32

pytestmark = pytest.mark.usefixtures("card")

OURS: dict[str, Any] = {"backend": "cuda", "device": DEVICE}
PERSISTENT_DTYPES = (torch.float32, *NARROW)
# The simulator holds eight blocks of eight units.
SIZES = [
    LstmCase(f"H{hidden} B{batch}", 5, hidden, {"bidirectional": hidden < 33}, 4, batch)
    for hidden, batch in [
        *((1, 1), (1, 3), (3, 17), (7, 2), (8, 70), (9, 16), (16, 33), (31, 130), (32, 5)),
        *((33, 7), (40, 65), (63, 3), (64, 16), (64, 67), (65, 4), (100, 3)),
    ]
]
PACKED = [
    LstmCase("equal", 5, 17, STACK, 4, 3, (4, 4, 4), initial=True),
    LstmCase("many", 3, 6, STACK, 6, 40, tuple(1 + n % 6 for n in range(40)), initial=True),
    LstmCase("wide", 5, 60, {}, 5, 70, tuple(5 - n // 14 for n in range(70)), initial=True),
    LstmCase("one", 5, 20, {"bidirectional": True}, 5, 1, (5,)),
]
# Several groups of the depth for each warp; the last does not fit the simulator's memory.
DEEP = [
    LstmCase("H264 B80", 5, 264, {}, 2, 80, initial=True),
    LstmCase(
        *("packed", 5, 258, {"bidirectional": True}, 3, 60),
        *(tuple(1 + n % 3 for n in range(60)), True),
    ),
    LstmCase("H520 B3", 5, 520, {"bidirectional": True}, 2, 3),
    *([] if IS_SIMULATED else [LstmCase("H1024 B70", 5, 1024, {}, 3, 70, initial=True)]),
]
TF32 = [
    LstmCase("one layer", 5, 40, {}, 6, 20, initial=True),
    LstmCase("both directions", 5, 17, STACK, 5, 9, initial=True),
    LstmCase("packed", 5, 24, STACK, 6, 5, (2, 6, 1, 6, 3), initial=True),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's products are small, and the simulator's blocks take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The ways that layers took, with their grids."""
    taken: list[tuple[str, Any]] = []

    def spy(name: str) -> None:
        run_way = getattr(cuda_lstm, name)

        def spied(layer: Any, *arguments: Any) -> Any:
            grid = arguments[0] if "persistent" in name else None
            taken.append((name.strip("_").split("_")[0], grid))
            return run_way(layer, *arguments)

        monkeypatch.setattr(cuda_lstm, name, spied)

    for name in ("forward", "backward"):
        spy(f"_persistent_{name}")
        spy(f"_stepwise_{name}")
    return taken


@pytest.fixture
def large_card(card: CudaBackend) -> Iterator[None]:  # noqa: F811
    """Holds as many blocks as a real one."""
    if IS_SIMULATED:
        card.native.set_max_resident_blocks(80)  # type: ignore[union-attr]
    yield
    if IS_SIMULATED:
        card.native.set_max_resident_blocks(8)  # type: ignore[union-attr]


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """No persistent kernel fits."""
    monkeypatch.setattr(cuda_lstm.Layer, "grid", lambda layer, backward: None)


@pytest.fixture
def shared_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight blocks share the columns of the backward's products, however small they are."""
    grid = cuda_lstm.Layer.grid

    def shared(layer: Any, *, backward: bool) -> Any:
        found = grid(layer, backward=backward)
        if found is None or not backward:
            return found
        return 1, -(-layer.batch // 16) * 16, layer.directions == 1, 8

    monkeypatch.setattr(cuda_lstm.Layer, "grid", shared)


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("case", GRID + SIZES + PACKED + LAID_OUT, **NAMED)
def test_fp32_is_stocks(case: LstmCase) -> None:
    check(case, torch.float32, **OURS)


@pytest.mark.parametrize("case", GRID + PACKED + LAID_OUT, **NAMED)
def test_fp64_is_stocks(case: LstmCase, ways: list[Any]) -> None:
    check(case, torch.float64, **OURS)
    assert {way for way, _ in ways} == {"stepwise"}


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("case", GRID + PACKED, **NAMED)
def test_fp32_step_by_step_is_stocks(case: LstmCase) -> None:
    check(case, torch.float32, **OURS)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", SHARP + NARROW_GRID + SIZES[4:] + PACKED + LAID_OUT[:4], **NAMED)
def test_half_precision_is_no_worse_than_stocks(case: LstmCase, dtype: torch.dtype) -> None:
    check_error(case, dtype, **OURS)


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", SHARP, **NAMED)
def test_half_precision_step_by_step(case: LstmCase, dtype: torch.dtype) -> None:
    check_error(case, dtype, **OURS)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("case", TF32, **NAMED)
def test_tf32_is_as_exact_as_tf32_can_be(case: LstmCase, ways: list[Any]) -> None:
    ours, _ = case.pair(torch.float32, **OURS)
    actual = run(ours, case.sample(torch.float32).to(DEVICE))
    for name, truth in exact(case, torch.float32).items():
        if truth.is_floating_point():
            assert_as_near_as_tf32(actual[name], truth)
    assert {way for way, _ in ways} == {"persistent"}


@pytest.mark.usefixtures("large_card")
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
@pytest.mark.parametrize("case", DEEP, **NAMED)
def test_many_hidden_units(case: LstmCase, dtype: torch.dtype, ways: list[Any]) -> None:
    (check if dtype is torch.float32 else check_error)(case, dtype, **OURS)
    assert {way for way, _ in ways} == {"persistent"}
    # Where each block would have to read much, blocks share their columns in the backward pass.
    shared = [grid[3] > 1 for _, grid in ways]
    assert not shared[0]
    if IS_SIMULATED:
        assert shared[1] == (case.batch != 3 or dtype is torch.float32)


@pytest.mark.usefixtures("large_card")
@pytest.mark.parametrize("case", DEEP, **NAMED)
def test_many_hidden_units_as_tf32(case: LstmCase, tf32: None, ways: list[Any]) -> None:
    test_tf32_is_as_exact_as_tf32_can_be(case, ways)


@pytest.mark.usefixtures("shared_columns")
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SIZES[4:14], *PACKED, SHARP[1], SHARP[3]], **NAMED)
def test_blocks_that_share_columns(case: LstmCase, dtype: torch.dtype) -> None:
    (check if dtype is torch.float32 else check_error)(case, dtype, **OURS)


@pytest.mark.usefixtures("shared_columns")
@pytest.mark.parametrize("case", TF32, **NAMED)
def test_blocks_that_share_columns_as_tf32(case: LstmCase, tf32: None, ways: list[Any]) -> None:
    test_tf32_is_as_exact_as_tf32_can_be(case, ways)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", ["two layers", "batch first", "projection"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_outputs_that_the_loss_does_not_use(dtype: torch.dtype, options: str, loss: str) -> None:
    check(LstmCase(options, options=OPTIONS[options], initial=True), dtype, loss, **OURS)


@pytest.mark.parametrize("loss", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_a_packed_loss_that_uses_one_output(dtype: torch.dtype, loss: str) -> None:
    case = LstmCase("packed", options=STACK, lengths=(2, 6, 1), initial=True)
    check(case, dtype, loss, **OURS)


@pytest.mark.skipif(not IS_SIMULATED, reason="stock draws on the CPU")
@pytest.mark.parametrize("case", DROPPED, **NAMED)
def test_dropout_between_layers_draws_stocks_mask(case: LstmCase) -> None:
    results = []
    for lstm in case.pair(torch.float32, **OURS):
        torch.manual_seed(4)
        results.append(run(lstm, case.sample(torch.float32)))
    assert_same(*results, torch.float32)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="stock's autocast needs bf16 in oneDNN"
)
@pytest.mark.parametrize("case", [c for c in SHARP if not c.lengths][:2], **NAMED)
def test_autocast(case: LstmCase) -> None:
    results = []
    for lstm in case.pair(torch.float32, **OURS):
        device = next(lstm.parameters()).device.type
        sample = case.sample(torch.float32).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = forward(lstm, sample)
            weighted([outputs["output"], outputs["h_n"], outputs["c_n"]]).backward()
        grads = {f"d {name}": param.grad for name, param in lstm.named_parameters()}
        results.append({name: value.detach().cpu() for name, value in {**outputs, **grads}.items()})
    truth = exact(case, torch.float32)
    assert_no_worse(*results, {name: truth[name] for name in results[0]})


def test_which_way_a_layer_takes(ways: list[Any]) -> None:
    def grids(case: LstmCase, dtype: torch.dtype = torch.float32) -> set[Any]:
        ways.clear()
        run(case.pair(dtype, **OURS)[0], case.sample(dtype).to(DEVICE))
        assert len(ways) == 2 * case.options.get("num_layers", 1)
        return set(ways)

    projected = LstmCase("", options={"proj_size": 4})
    assert grids(projected) == grids(LstmCase(""), torch.float64) == {("stepwise", None)}
    assert grids(LstmCase("", 5, 1025, seq_len=2)) == {("stepwise", None)}
    if IS_SIMULATED:
        assert grids(LstmCase("", 5, 65)) == {("stepwise", None)}
        assert grids(LstmCase("", 5, 64, batch=33)) == {("persistent", (1, 48, True, 1))}
        one_after_the_other = LstmCase("", 5, 40, {"bidirectional": True})
        assert grids(one_after_the_other) == {("persistent", (1, 16, False, 1))}
        in_parts = LstmCase("", 5, 9, {"bidirectional": True}, batch=30)
        assert grids(in_parts) == {("persistent", (2, 16, True, 1))}
    else:
        assert {way for way, _ in grids(LstmCase("", 5, 512))} == {"persistent"}


@pytest.mark.parametrize("case", [PACKED[1], PACKED[2], SIZES[7]], **NAMED)
def test_both_ways_agree(case: LstmCase, request: pytest.FixtureRequest) -> None:
    ours, _ = case.pair(torch.float32, **OURS)
    persistent = run(ours, case.sample(torch.float32).to(DEVICE))
    request.getfixturevalue("stepwise")
    ours.zero_grad()
    assert_same(persistent, run(ours, case.sample(torch.float32).to(DEVICE)), torch.float32)


@pytest.mark.skipif(not IS_SIMULATED, reason="a card's order is its own")
@pytest.mark.parametrize("columns", ["own", "shared"])
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(
    dtype: torch.dtype,
    columns: str,
    card: CudaBackend,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    if columns == "shared":
        request.getfixturevalue("shared_columns")
    cases = [PACKED[1], LstmCase("", 5, 33, {}, 5, 20)]
    results = []
    for seed in range(5):
        assert card.native is not None
        card.native.set_seed(seed)
        results.append([run(c.pair(dtype, **OURS)[0], c.sample(dtype)) for c in cases])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_calls_from_several_threads_at_once() -> None:
    case = PACKED[1]
    ours, _ = case.pair(torch.float32, **OURS)
    expected = run(ours, case.sample(torch.float32).to(DEVICE))
    results: list[dict[str, Tensor]] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(forward(ours, case.sample(torch.float32).to(DEVICE)) for _ in range(3))

    workers = [threading.Thread(target=work) for _ in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 9
    for result in results:
        assert all(torch.equal(value.cpu(), expected[name]) for name, value in result.items())


@pytest.mark.parametrize("case", [PACKED[0], OPTIONS["projection"]], ids=["packed", "projection"])
def test_a_second_backward_gives_the_same_gradients(case: Any) -> None:
    case = case if isinstance(case, LstmCase) else LstmCase("", options=case, initial=True)
    ours, _ = case.pair(torch.float32, **OURS)
    sample = case.sample(torch.float32).to(DEVICE)
    outputs = forward(ours, sample)
    loss = weighted([outputs["output"], outputs["c_n"]])
    leaves = [sample.leaf, *sample.states, *ours.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("wanted", ["input", "h_0", "c_0", "weight_ih", "weight_hh_l1", "bias_hh"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_some_gradients_are_wanted(dtype: torch.dtype, wanted: str) -> None:
    case = LstmCase("", options=STACK, initial=True)
    results = []
    for lstm, device in zip(case.pair(dtype, **OURS), (DEVICE, "cpu"), strict=True):
        sample = case.sample(dtype).to(device)
        assert sample.states is not None
        states = {"h_0": sample.states[0], "c_0": sample.states[1]}
        for name, leaf in {"input": sample.leaf, **states, **dict(lstm.named_parameters())}.items():
            leaf.requires_grad_(name.startswith(wanted))
        results.append(run(lstm, sample))
    assert_same(*results, dtype)


def test_the_users_defaults_do_not_matter() -> None:
    case = PACKED[1]
    ours, _ = case.pair(torch.float32, **OURS)
    sample = case.sample(torch.float32).to(DEVICE)
    arguments = sample.arguments()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            output, (h_n, c_n) = ours(*arguments)
            (output.data.sum() + h_n.sum() + c_n.sum()).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sample.leaf.grad is not None and sample.leaf.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, value: float) -> None:
    case = LstmCase("", 5, 33, {}, 4, 20, initial=True)
    ours, _ = case.pair(dtype, **OURS)
    clean = forward(ours, case.sample(dtype).to(DEVICE))
    sample = case.sample(dtype).to(DEVICE)
    with torch.no_grad():
        sample.leaf[1, 17, 3] = value
    dirty = forward(ours, sample)
    others = [row for row in range(20) if row != 17]
    for name in ("output", "h_n", "c_n"):
        assert torch.equal(clean[name][:, others], dirty[name][:, others])
    if value != value:
        assert dirty["output"][1:, 17].isnan().all() and not dirty["output"][0].isnan().any()


def test_gradcheck() -> None:
    for case in (LstmCase("", 2, 3, {"bidirectional": True}, 3, 2, initial=True), PACKED[3]):
        lstm = case.pair(torch.float64, **OURS)[0]
        sample = case.sample(torch.float64).to(DEVICE)
        given = [sample.leaf, *(sample.states or ())]

        def outputs(*leaves: Tensor, sample: Any = sample, lstm: Any = lstm) -> tuple[Tensor, ...]:
            mine = sample._replace(leaf=leaves[0], states=leaves[1:] or None)
            named = forward(lstm, mine)
            return named["output"], named["h_n"], named["c_n"]

        torch.autograd.gradcheck(outputs, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_opcheck(dtype: torch.dtype, is_packed: bool) -> None:
    directions, hidden, batch, inputs = 2, 9, 3, 5

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)

    sizes = torch.tensor([3, 2, 2]) if is_packed else None
    weights = [values(4 * hidden, inputs), values(4 * hidden, hidden), *(values(4 * hidden),) * 2]
    layer = (
        values(7, inputs) if is_packed else values(3, batch, inputs),
        *(sizes, values(directions, batch, hidden), values(directions, batch, hidden)),
        *([*weights, *(w.detach().clone().requires_grad_() for w in weights)], True),
    )
    torch.library.opcheck(torch.ops.fastopt.lstm_layer.default, (*layer, None, True, "cuda"))


def test_compiled_code_runs_the_kernels() -> None:
    torch._dynamo.reset()
    lstm = fastopt.nn.LSTM(5, 9, backend="cuda", device=DEVICE)
    data = torch.randn(4, 3, 5, device=DEVICE)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
        output, _ = compiled(data)
        output.sum().backward()
    assert torch.equal(output, lstm(data)[0])
    assert all(param.grad is not None for param in lstm.parameters())


class Canaries:
    """Tensors in the middle of memory that nobody may write."""

    MARGIN = 64

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def around(self, tensor: Tensor) -> Tensor:
        buffer = torch.full(
            (tensor.numel() + 2 * self.MARGIN,), 7, dtype=tensor.dtype, device=DEVICE
        )
        self.buffers.append(buffer)
        return buffer[self.MARGIN : -self.MARGIN].view(tensor.shape).copy_(tensor)

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[: self.MARGIN] == 7).all() and (buffer[-self.MARGIN :] == 7).all()


@pytest.mark.parametrize("columns", ["own", "shared"])
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
@pytest.mark.parametrize("case", [PACKED[1], SIZES[5], SIZES[9]], **NAMED)
def test_nothing_is_written_outside(
    dtype: torch.dtype,
    case: LstmCase,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if columns == "shared":
        request.getfixturevalue("shared_columns")
    canaries = Canaries()

    class Native:
        """Gives the kernels what they were given, with canaries around."""

        def __init__(self, native: Any) -> None:
            self._native = native

        def __getattr__(self, name: str) -> Any:
            return getattr(self._native, name)

        def _run(self, name: str, arguments: dict[str, Any]) -> None:
            tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
            inside = {name: canaries.around(tensor) for name, tensor in tensors.items()}
            getattr(self._native, name)(**{**arguments, **inside})
            for key, tensor in tensors.items():
                if not torch.equal(tensor, inside[key]):  # autograd counts writes of its own
                    tensor.copy_(inside[key])

        def forward(self, **arguments: Any) -> None:
            self._run("forward", arguments)

        def backward(self, **arguments: Any) -> None:
            self._run("backward", arguments)

    make = cuda_lstm.Layer.__init__

    def wrapped(layer: Any, *arguments: Any) -> None:
        make(layer, *arguments)
        layer.native = Native(layer.native)

    monkeypatch.setattr(cuda_lstm.Layer, "__init__", wrapped)
    (check if dtype is torch.float32 else check_error)(case, dtype, **OURS)
    assert len(canaries.buffers) > 10
    canaries.check()


LAYER: dict[str, Any] = {
    **{"dtype": 0, "device_type": cuda_lstm.DLPACK_DEVICES[DEVICE], "device_index": 0},
    **{"directions": 1, "steps": 2, "batch": 3, "tokens": 6, "hidden": 4, "first_token": None},
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": 9}, "no kernel has this dtype"),
        ({"directions": 3}, "1 or 2 directions"),
        ({"hidden": 0}, "1 or 2 directions"),
        ({"tokens": 5}, "every step has all rows"),
        ({"first_token": torch.zeros(2, dtype=torch.int64)}, r"integers of shape \[3\]"),
        ({"first_token": torch.zeros(3)}, r"integers of shape \[3\]"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_is_refused(
    changes: dict[str, Any],
    text: str,
    card: CudaBackend,  # noqa: F811
) -> None:
    there = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}
    assert card.native is not None
    with pytest.raises(ValueError, match=text):
        card.native.LstmLayer(**LAYER | there)


@pytest.mark.parametrize("name", ["gates", "cells", "exchange", "counters", "output", "weights"])
@pytest.mark.parametrize("change", ["short", "dtype", "strided"])
def test_a_tensor_that_does_not_fit_is_refused(
    name: str,
    change: str,
    card: CudaBackend,  # noqa: F811
) -> None:
    assert card.native is not None
    layer = card.native.LstmLayer(**LAYER)
    shapes = {
        **{"gates": (1, 6, 16), "initial_hidden": (1, 3, 4), "cells": (1, 3, 4)},
        **{"output": (6, 4), "final_hidden": (1, 3, 4), "saved_cells": (1, 6, 4)},
        **{"weights": (16, 4), "exchange": (2, 1, 3, layer.exchange_width(False))},
    }
    given: dict[str, Any] = {k: torch.zeros(shape, device=DEVICE) for k, shape in shapes.items()}
    given["counters"] = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    fitting = given[name]
    given[name] = {
        "short": fitting[..., :-1].contiguous(),
        "dtype": fitting.double(),
        "strided": fitting.repeat_interleave(2, -1)[..., ::2],
    }[change]
    if name == "counters" and change == "strided":
        given[name] = fitting.long()
    given["weights"] = [given["weights"]]
    with pytest.raises(ValueError, match="weight_hh must" if name == "weights" else f"{name} must"):
        layer.forward(grid=(1, 16, True, 1), tf32=False, save_gates=True, stream=0, **given)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((3, 3, 3), "must sum to the tokens"),
        ((3, 2, 3, 4), "must not grow"),
        ((3, 3, 3, 3, 0), "must be positive"),
        ((4, 4, 4), "must begin with the batch"),
    ],
    ids=str,
)
def test_steps_that_do_not_fit_are_refused(sizes: tuple[int, ...], text: str) -> None:
    state = torch.zeros(1, 3, 6, device=DEVICE)
    weights = [torch.zeros(24, 5, device=DEVICE), torch.zeros(24, 6, device=DEVICE)]
    layer = torch.zeros(12, 5, device=DEVICE), torch.tensor(sizes), state, state, weights, False
    with pytest.raises(ValueError, match=text):
        torch.ops.fastopt.lstm_layer(*layer, None, True, "cuda")


def test_what_a_graphs_capture_cannot_take(
    monkeypatch: pytest.MonkeyPatch,
    card: CudaBackend,  # noqa: F811
) -> None:
    assert card.native is not None
    monkeypatch.setattr(cuda_lstm, "is_capturing", lambda device: True)
    monkeypatch.setattr(cuda_lstm, "_loaded", set())
    data, states = torch.randn(4, 5, device=DEVICE), torch.randn(1, 2, 3, device=DEVICE)
    padded = LstmRequest(data.view(2, 2, 5), None, states, states, [], False, 1, False)
    packed = dataclasses.replace(padded, input=data, batch_sizes=torch.tensor([2, 2]))
    assert "cannot be copied inside" in (cuda_lstm.refuse_capture(card.native, packed) or "")
    assert "needs a call before it" in (cuda_lstm.refuse_capture(card.native, padded) or "")
    assert not card.missing
    cuda_lstm.load(card.native, torch.float32, data.device)
    assert cuda_lstm.refuse_capture(card.native, padded) is None


def test_the_self_check_lets_right_kernels_in(card: CudaBackend) -> None:  # noqa: F811
    outcomes = selfcheck.run("lstm", card, torch.device(DEVICE))
    assert len(outcomes) >= 8 and not any(outcome.error for outcome in outcomes)


@pytest.mark.parametrize("around", ["autocast", "compiled"])
def test_a_first_use_is_checked_wherever_it_is(
    around: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FASTOPT_SELFCHECK", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    selfcheck.forget()
    lstm = fastopt.nn.LSTM(5, 9, backend="cuda", device=DEVICE)
    data = torch.randn(4, 3, 5, device=DEVICE)
    torch.manual_seed(3)
    if around == "autocast":
        with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad():
            lstm(data)
    else:
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
            torch.compile(lstm, backend="aot_eager", fullgraph=True)(data)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert len(list(selfcheck.cache_directory().glob("*"))) == 1  # it ran
    selfcheck.forget()


def test_a_wrong_kernel_goes_to_torch_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    right = cuda_lstm.forward

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        output, *rest = right(*arguments)
        return output + 1e-3, *rest

    monkeypatch.setattr(cuda_lstm, "forward", wrong)
    monkeypatch.setenv("FASTOPT_SELFCHECK", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(registry.AUTO_ORDER, DEVICE, ("cuda", "torch"))
    selfcheck.forget()
    case = LstmCase("")
    with pytest.warns(RuntimeWarning, match=r"kernels for lstm failed their self-check .* 'fp32'"):
        assert_same(*both(case, torch.float32, device=DEVICE, backend="auto"), torch.float32)
    with pytest.raises(RuntimeError, match=r"failed their self-check on this card"):
        both(case, torch.float32, **OURS)
    selfcheck.forget()

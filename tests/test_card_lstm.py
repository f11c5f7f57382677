"""The LSTM's kernels for cards: stock's numbers, on a card or where the host plays one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from cards import CARD_BACKENDS, DEVICE, IS_SIMULATED, card, not_interpreted, over_cards  # noqa: F401
from fastopt.backends import cuda_lstm, lstm_requests, registry, selfcheck
from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda_lstm import CudaRecurrence
from fastopt.backends.triton import launch
from fastopt.backends.triton import lstm as triton_lstm
from fastopt.backends.triton.lstm import TritonRecurrence
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

RECURRENCES = (CudaRecurrence, TritonRecurrence)
A_CHECK_IS_LONG = "a self-check takes Triton's interpreter long; the test before runs one"
MODULES = {"cuda": cuda_lstm, "triton": triton_lstm}
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
TF32 = [
    LstmCase("one layer", 5, 40, {}, 6, 20, initial=True),
    LstmCase("both directions", 5, 17, STACK, 5, 9, initial=True),
    LstmCase("packed", 5, 24, STACK, 6, 5, (2, 6, 1, 6, 3), initial=True),
]


def ours(backend: str) -> dict[str, Any]:
    """Has a case run by a backend."""
    return {"backend": backend, "device": DEVICE}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's products are small, and the simulator's blocks take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How layers ran, pass by pass: by kernels that multiply, or step by step."""
    taken: list[str] = []

    def spy(recurrence: Any, name: str) -> None:
        run_way = getattr(recurrence, name)

        def spied(self: Any, run: Any) -> Any:
            found = run_way(self, run)
            taken.append("stepwise" if found is None else "fused")
            return found

        monkeypatch.setattr(recurrence, name, spied)

    for recurrence in RECURRENCES:
        spy(recurrence, "forward")
        spy(recurrence, "backward")
    return taken


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch multiplies at every step."""
    for recurrence in RECURRENCES:
        for name in ("forward", "backward"):
            monkeypatch.setattr(recurrence, name, lambda self, run: None)


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@over_cards("case", GRID + SIZES + PACKED + LAID_OUT, sample=10)
def test_fp32_is_stocks(backend: str, case: LstmCase) -> None:
    check(case, torch.float32, **ours(backend))


@over_cards("case", GRID + PACKED + LAID_OUT, sample=9)
def test_fp64_is_stocks(backend: str, case: LstmCase, ways: list[str]) -> None:
    check(case, torch.float64, **ours(backend))
    assert set(ways) == {"stepwise"}


@pytest.mark.usefixtures("stepwise")
@over_cards("case", GRID + PACKED, sample=15)
def test_fp32_step_by_step_is_stocks(backend: str, case: LstmCase) -> None:
    check(case, torch.float32, **ours(backend))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@over_cards("case", SHARP + NARROW_GRID + SIZES[4:] + PACKED + LAID_OUT[:4], sample=8)
def test_half_precision_is_no_worse_than_stocks(
    backend: str, case: LstmCase, dtype: torch.dtype
) -> None:
    check_error(case, dtype, **ours(backend))


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@over_cards("case", SHARP, sample=3)
def test_half_precision_step_by_step(backend: str, case: LstmCase, dtype: torch.dtype) -> None:
    check_error(case, dtype, **ours(backend))


def check_tf32(case: LstmCase, backend: str) -> None:
    lstm, _ = case.pair(torch.float32, **ours(backend))
    actual = run(lstm, case.sample(torch.float32).to(DEVICE))
    for name, truth in exact(case, torch.float32).items():
        if truth.is_floating_point():
            assert_as_near_as_tf32(actual[name], truth)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("backend", not_interpreted("Triton's interpreter multiplies fp32 exactly"))
@pytest.mark.parametrize("case", TF32, **NAMED)
def test_tf32_is_as_exact_as_tf32_can_be(backend: str, case: LstmCase, ways: list[str]) -> None:
    check_tf32(case, backend)
    assert set(ways) == {"fused"}


@pytest.mark.parametrize("loss", LOSSES)
@over_cards("options", ["batch first", "two layers", "projection"], sample=3)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_outputs_that_the_loss_does_not_use(
    dtype: torch.dtype, backend: str, options: str, loss: str
) -> None:
    case = LstmCase(options, options=OPTIONS[options], initial=True)
    check(case, dtype, loss, **ours(backend))


@over_cards("loss", ["c_n", "output", "h_n"], sample=2)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_a_packed_loss_that_uses_one_output(dtype: torch.dtype, backend: str, loss: str) -> None:
    case = LstmCase("packed", options=STACK, lengths=(2, 6, 1), initial=True)
    check(case, dtype, loss, **ours(backend))


@pytest.mark.skipif(not IS_SIMULATED, reason="stock draws on the CPU")
@over_cards("case", DROPPED, sample=4)
def test_dropout_between_layers_draws_stocks_mask(backend: str, case: LstmCase) -> None:
    results = []
    for lstm in case.pair(torch.float32, **ours(backend)):
        torch.manual_seed(4)
        results.append(run(lstm, case.sample(torch.float32)))
    assert_same(*results, torch.float32)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="stock's autocast needs bf16 in oneDNN"
)
@over_cards("case", [c for c in SHARP if not c.lengths][:2], sample=2)
def test_autocast(backend: str, case: LstmCase) -> None:
    results = []
    for lstm in case.pair(torch.float32, **ours(backend)):
        device = next(lstm.parameters()).device.type
        sample = case.sample(torch.float32).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = forward(lstm, sample)
            weighted([outputs["output"], outputs["h_n"], outputs["c_n"]]).backward()
        grads = {f"d {name}": param.grad for name, param in lstm.named_parameters()}
        results.append({name: value.detach().cpu() for name, value in {**outputs, **grads}.items()})
    truth = exact(case, torch.float32)
    assert_no_worse(*results, {name: truth[name] for name in results[0]})


@over_cards("case", [PACKED[1], PACKED[2], SIZES[7]], sample=3)
def test_both_ways_agree(backend: str, case: LstmCase, request: pytest.FixtureRequest) -> None:
    lstm, _ = case.pair(torch.float32, **ours(backend))
    fused = run(lstm, case.sample(torch.float32).to(DEVICE))
    request.getfixturevalue("stepwise")
    lstm.zero_grad()
    assert_same(fused, run(lstm, case.sample(torch.float32).to(DEVICE)), torch.float32)


@pytest.mark.parametrize("backend", not_interpreted("Triton's interpreter knows one thread"))
def test_calls_from_several_threads_at_once(backend: str) -> None:
    case = PACKED[1]
    lstm, _ = case.pair(torch.float32, **ours(backend))
    expected = run(lstm, case.sample(torch.float32).to(DEVICE))
    results: list[dict[str, Tensor]] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(forward(lstm, case.sample(torch.float32).to(DEVICE)) for _ in range(3))

    workers = [threading.Thread(target=work) for _ in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 9
    for result in results:
        assert all(torch.equal(value.cpu(), expected[name]) for name, value in result.items())


@pytest.mark.parametrize("backend", CARD_BACKENDS)
@pytest.mark.parametrize("case", [PACKED[0], OPTIONS["projection"]], ids=["packed", "projection"])
def test_a_second_backward_gives_the_same_gradients(backend: str, case: Any) -> None:
    case = case if isinstance(case, LstmCase) else LstmCase("", options=case, initial=True)
    lstm, _ = case.pair(torch.float32, **ours(backend))
    sample = case.sample(torch.float32).to(DEVICE)
    outputs = forward(lstm, sample)
    loss = weighted([outputs["output"], outputs["c_n"]])
    leaves = [sample.leaf, *sample.states, *lstm.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


@over_cards("wanted", ["input", "h_0", "c_0", "weight_ih", "weight_hh_l1", "bias_hh"], sample=3)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_some_gradients_are_wanted(dtype: torch.dtype, backend: str, wanted: str) -> None:
    case = LstmCase("", options=STACK, initial=True)
    results = []
    for lstm, device in zip(case.pair(dtype, **ours(backend)), (DEVICE, "cpu"), strict=True):
        sample = case.sample(dtype).to(device)
        assert sample.states is not None
        states = {"h_0": sample.states[0], "c_0": sample.states[1]}
        for name, leaf in {"input": sample.leaf, **states, **dict(lstm.named_parameters())}.items():
            leaf.requires_grad_(name.startswith(wanted))
        results.append(run(lstm, sample))
    assert_same(*results, dtype)


@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_the_users_defaults_do_not_matter(backend: str) -> None:
    case = PACKED[1]
    lstm, _ = case.pair(torch.float32, **ours(backend))
    sample = case.sample(torch.float32).to(DEVICE)
    arguments = sample.arguments()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            output, (h_n, c_n) = lstm(*arguments)
            (output.data.sum() + h_n.sum() + c_n.sum()).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sample.leaf.grad is not None and sample.leaf.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lstm.parameters())


@pytest.mark.parametrize("backend", CARD_BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, backend: str, value: float) -> None:
    case = LstmCase("", 5, 33, {}, 4, 20, initial=True)
    lstm, _ = case.pair(dtype, **ours(backend))
    clean = forward(lstm, case.sample(dtype).to(DEVICE))
    sample = case.sample(dtype).to(DEVICE)
    with torch.no_grad():
        sample.leaf[1, 17, 3] = value
    dirty = forward(lstm, sample)
    others = [row for row in range(20) if row != 17]
    for name in ("output", "h_n", "c_n"):
        assert torch.equal(clean[name][:, others], dirty[name][:, others])
    if value != value:
        assert dirty["output"][1:, 17].isnan().all() and not dirty["output"][0].isnan().any()


@pytest.mark.parametrize(
    "backend", not_interpreted("gradcheck calls more often than Triton's interpreter has time for")
)
def test_gradcheck(backend: str) -> None:
    for case in (LstmCase("", 2, 3, {"bidirectional": True}, 3, 2, initial=True), PACKED[3]):
        lstm = case.pair(torch.float64, **ours(backend))[0]
        sample = case.sample(torch.float64).to(DEVICE)
        given = [sample.leaf, *(sample.states or ())]

        def outputs(*leaves: Tensor, sample: Any = sample, lstm: Any = lstm) -> tuple[Tensor, ...]:
            mine = sample._replace(leaf=leaves[0], states=leaves[1:] or None)
            named = forward(lstm, mine)
            return named["output"], named["h_n"], named["c_n"]

        torch.autograd.gradcheck(outputs, given)


@pytest.mark.parametrize("backend", CARD_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_opcheck(dtype: torch.dtype, is_packed: bool, backend: str) -> None:
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
    torch.library.opcheck(torch.ops.fastopt.lstm_layer.default, (*layer, None, True, backend))


@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_compiled_code_runs_the_kernels(backend: str) -> None:
    torch._dynamo.reset()
    lstm = fastopt.nn.LSTM(5, 9, **ours(backend))
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
@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_steps_that_do_not_fit_are_refused(sizes: tuple[int, ...], text: str, backend: str) -> None:
    state = torch.zeros(1, 3, 6, device=DEVICE)
    weights = [torch.zeros(24, 5, device=DEVICE), torch.zeros(24, 6, device=DEVICE)]
    layer = torch.zeros(12, 5, device=DEVICE), torch.tensor(sizes), state, state, weights, False
    with pytest.raises(ValueError, match=text):
        torch.ops.fastopt.lstm_layer(*layer, None, True, backend)


@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_what_a_graphs_capture_cannot_take(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = True
    for module in lstm_requests, triton_lstm, launch:
        monkeypatch.setattr(module, "is_capturing", lambda device: capturing)
    for module in cuda_lstm, launch:
        monkeypatch.setattr(module, "_loaded", set())
    kernels = registry.BACKENDS[backend]
    data, states = torch.randn(4, 5, device=DEVICE), torch.randn(1, 2, 3, device=DEVICE)
    weights = [torch.randn(12, inputs, device=DEVICE) for inputs in (5, 3)]
    padded = LstmRequest(data.view(2, 2, 5), None, states, states, weights, False, 1, False)
    packed = dataclasses.replace(padded, input=data, batch_sizes=torch.tensor([2, 2]))
    assert "cannot be copied inside" in (kernels.supports_lstm(packed) or "")
    assert "needs a call before it" in (kernels.supports_lstm(padded) or "")
    capturing = False
    output, hidden, cell, *saved = kernels.lstm_forward(padded, None, True)
    capturing = True
    assert kernels.supports_lstm(padded) is None
    if backend == "triton":  # whose passes are loaded one by one, as they are compiled
        states.requires_grad_()
        assert "needs a call before it" in (kernels.supports_lstm(padded) or "")
        arguments = padded, (output, hidden, cell), [output, *saved], [False] * 5
        with torch.no_grad(), pytest.raises(RuntimeError, match="needs a call before it"):
            kernels.lstm_backward(*arguments)
        capturing = False
        with torch.no_grad():
            kernels.lstm_backward(*arguments)
        capturing = True
        assert kernels.supports_lstm(padded) is None


@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_the_self_check_lets_right_kernels_in(backend: str) -> None:
    outcomes = selfcheck.run("lstm", registry.BACKENDS[backend], torch.device(DEVICE))
    assert len(outcomes) >= 8 and not any(outcome.error for outcome in outcomes)


@pytest.mark.parametrize("backend", not_interpreted(A_CHECK_IS_LONG))
@pytest.mark.parametrize("around", ["autocast", "compiled"])
def test_a_first_use_is_checked_wherever_it_is(
    around: str, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FASTOPT_SELFCHECK", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    selfcheck.forget()
    lstm = fastopt.nn.LSTM(5, 9, **ours(backend))
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


@pytest.mark.parametrize("backend", not_interpreted(A_CHECK_IS_LONG))
def test_a_wrong_kernel_goes_to_torch_with_one_warning(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    right = MODULES[backend].forward

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        output, *rest = right(*arguments)
        return output + 1e-3, *rest

    monkeypatch.setattr(MODULES[backend], "forward", wrong)
    monkeypatch.setenv("FASTOPT_SELFCHECK", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(registry.AUTO_ORDER, DEVICE, (backend, "torch"))
    selfcheck.forget()
    case = LstmCase("")
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # what takes over
    with (
        exact,
        pytest.warns(RuntimeWarning, match=r"kernels for lstm failed their self-check .* 'fp32'"),
    ):
        assert_same(*both(case, torch.float32, device=DEVICE, backend="auto"), torch.float32)
    with pytest.raises(RuntimeError, match=r"failed their self-check on this card"):
        both(case, torch.float32, **ours(backend))
    selfcheck.forget()

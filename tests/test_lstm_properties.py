"""What holds of any call of the LSTM: threads, repeated backwards, NaN, random packed lengths."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastopt import nn
from lstm_cases import LstmCase, assert_same, forward, gradients, run, weighted
from tolerances import assert_matches

WIDE = (torch.float32, torch.float64)
NAMED = {"ids": lambda value: value.name if isinstance(value, LstmCase) else str(value)}
STACK: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
CASES = [
    LstmCase("stack", 9, 33, STACK, 6, 5, initial=True),
    LstmCase("projection", 9, 33, {"proj_size": 6}, 6, 5, initial=True),
    LstmCase("packed", 9, 33, STACK, 6, 4, (3, 6, 1, 5), initial=True),
]
# Enough work for several threads.
LARGE = [
    LstmCase("large", 64, 100, STACK, 20, 32, initial=True),
    LstmCase("large projection", 64, 100, {**STACK, "proj_size": 30}, 10, 24),
    LstmCase("large packed", 64, 100, {"num_layers": 2}, 12, 24, tuple(range(1, 13)) * 2),
    LstmCase("one sequence", 64, 200, {}, 20, 1),
]


def bits(case: LstmCase, dtype: torch.dtype) -> dict[str, Tensor]:
    return run(case.pair(dtype)[0], case.sample(dtype))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, **NAMED)
def test_any_number_of_threads_gives_the_same_bits(case: LstmCase, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    one = bits(case, dtype)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert_equal(bits(case, dtype), one)


@pytest.mark.parametrize("hidden", [1, 5, 12, 40])
def test_subnormal_halves_are_numbers(hidden: int) -> None:
    """They are no subnormals of what computes: a large state makes a pre-activation of one."""
    ours = nn.LSTM(1, hidden, bias=False, dtype=torch.float16, backend="cpu")
    torch.nn.init.zeros_(ours.weight_ih_l0)
    torch.nn.init.constant_(ours.weight_hh_l0, 2.0**-16)
    state = torch.zeros(1, 2, hidden).half()
    state[..., 0] = 6e4
    _, (_, cell) = ours(torch.zeros(1, 2, 1).half(), (state, torch.zeros_like(state)))
    gate = state.double()[..., :1] * 2.0**-16
    truth = (gate.sigmoid() * gate.tanh()).half().expand_as(cell)
    assert_matches(cell, truth, op="rounded once", dtype=torch.float16)


def test_calls_from_several_threads_at_once() -> None:
    torch.set_num_threads(2)
    expected = bits(CASES[0], torch.float32)
    ours, _ = CASES[0].pair(torch.float32)
    results: list[dict[str, Tensor]] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(forward(ours, CASES[0].sample(torch.float32)) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 60
    for result in results:
        assert_equal(result, {name: expected[name] for name in result})


@pytest.mark.parametrize("case", CASES, **NAMED)
def test_a_second_backward_gives_the_same_gradients(case: LstmCase) -> None:
    ours, _ = case.pair(torch.float32)
    sample = case.sample(torch.float32)
    outputs = forward(ours, sample)
    loss = weighted([outputs["output"], outputs["c_n"]])
    loss.backward(retain_graph=True)
    first = {name: grad.clone() for name, grad in gradients(ours, sample).items()}
    for leaf in (sample.leaf, *sample.states, *ours.parameters()):
        leaf.grad = None
    loss.backward()
    assert_equal(gradients(ours, sample), first)


def test_a_graph_that_was_freed_is_refused() -> None:
    for lstm in CASES[0].pair(torch.float32):
        outputs = forward(lstm, CASES[0].sample(torch.float32))
        loss = weighted([outputs["output"]])
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", CASES, **NAMED)
def test_gradients_accumulate(case: LstmCase, dtype: torch.dtype) -> None:
    pair, samples = case.pair(dtype), (case.sample(dtype), case.sample(dtype))
    for loss in ("all", "c_n", "output"):
        actual, expected = (run(m, s, loss) for m, s in zip(pair, samples, strict=True))
        assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", CASES, **NAMED)
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh_l0", "bias_hh", "_reverse", "weight"])
def test_frozen_parameters_get_no_gradient(frozen: str, case: LstmCase, dtype: torch.dtype) -> None:
    results = []
    for lstm in case.pair(dtype):
        for name, param in lstm.named_parameters():
            param.requires_grad_(frozen not in name)
        results.append(run(lstm, case.sample(dtype)))
    assert_same(*results, dtype)


@pytest.mark.parametrize("wanted", ["input", "h_0", "c_0", "parameters"])
@pytest.mark.parametrize("case", CASES, **NAMED)
def test_one_kind_of_leaf_asks_for_gradients(case: LstmCase, wanted: str) -> None:
    results = []
    for lstm in case.pair(torch.float64):
        sample = case.sample(torch.float64)
        leaves = {"input": sample.leaf, "h_0": sample.states[0], "c_0": sample.states[1]}
        lstm.requires_grad_(wanted == "parameters")
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        results.append(run(lstm, sample))
    assert_same(*results, torch.float64)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", CASES[:2], **NAMED)
def test_expanded_and_transposed_gradients_arrive(case: LstmCase, dtype: torch.dtype) -> None:
    results = []
    for lstm in case.pair(dtype):
        sample = case.sample(dtype)
        outputs = forward(lstm, sample)
        grads = torch.linspace(-1, 1, outputs["output"].numel(), dtype=dtype)
        transposed = grads.view(outputs["output"].transpose(0, 2).shape).transpose(0, 2)
        outputs["output"].backward(transposed, retain_graph=True)
        (outputs["h_n"].sum() + outputs["c_n"].sum()).backward()  # gradients with strides of 0
        results.append(outputs | gradients(lstm, sample))
    assert_same(*results, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(
    "make", [lambda w: w.t().contiguous().t(), lambda w: w.repeat(2, 2)[::2, ::2]]
)
def test_weights_of_any_strides(make: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    results = []
    for lstm in CASES[0].pair(dtype):
        for name in ("weight_ih_l0", "weight_hh_l1_reverse"):
            strided = make(getattr(lstm, name).detach())
            setattr(lstm, name, torch.nn.Parameter(strided))
        results.append(run(lstm, CASES[0].sample(dtype)))
    assert_same(*results, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", ["input", "h_0", "c_0", "weight"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_nan_and_infinity_propagate(dtype: torch.dtype, place: str, value: float) -> None:
    results = []
    for lstm in CASES[0].pair(dtype):
        sample = CASES[0].sample(dtype)
        tensors = {"input": sample.leaf, "h_0": sample.states[0], "c_0": sample.states[1]}
        with torch.no_grad():
            if place == "weight":
                lstm.weight_hh_l1[7, 3] = value
            else:
                tensors[place][1, 2, 3] = value
        results.append(run(lstm, sample))
    actual, expected = results
    assert_same(*({k: v for k, v in r.items() if k[:2] != "d "} for r in results), dtype)
    for name, grad in expected.items():  # 0 * inf, or what a sigmoid that is nearly 1 leaves of it
        assert torch.equal(actual[name].isfinite(), grad.isfinite()), name


@pytest.mark.parametrize("scale", [1e-42, 30.0, 1e30], ids=str)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_saturated_and_subnormal_values(dtype: torch.dtype, scale: float) -> None:
    results = []
    for lstm in CASES[0].pair(dtype):
        sample = CASES[0].sample(dtype)
        with torch.no_grad():
            for tensor in (sample.leaf, *sample.states):
                tensor *= scale
        results.append(forward(lstm, sample))
    assert_same(*results, dtype)


@pytest.mark.parametrize("flush", [False, True])
def test_the_handling_of_subnormals_is_left_alone(flush: bool) -> None:
    subnormal = torch.full((1 << 17,), 1e-40)
    torch.set_num_threads(2)
    torch.set_flush_denormal(flush)
    try:
        before = subnormal * 0.5
        bits(LARGE[0], torch.float32)
        assert torch.equal(subnormal * 0.5, before)
        assert (subnormal[:1] * 0.5 == 0).item() is flush
    finally:
        torch.set_flush_denormal(False)


def test_inputs_are_not_written() -> None:
    ours, _ = CASES[0].pair(torch.float32)
    sample = CASES[0].sample(torch.float32)
    tensors = [sample.leaf, *sample.states, *ours.parameters()]
    before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
    run(ours, sample)
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version and torch.equal(tensor, value)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6).map(tuple),
    hidden=st.integers(2, 20),
    projected=st.booleans(),
    layers=st.integers(1, 3),
    flags=st.fixed_dictionaries(
        {key: st.booleans() for key in ("bias", "bidirectional", "batch_first")}
    ),
    initial=st.booleans(),
    dtype=st.sampled_from(WIDE),
)
def test_packed_sequences_of_any_lengths(
    lengths: tuple[int, ...],
    hidden: int,
    projected: bool,
    layers: int,
    flags: dict[str, bool],
    initial: bool,
    dtype: torch.dtype,
) -> None:
    options = {"num_layers": layers, "proj_size": hidden // 2 if projected else 0, **flags}
    case = LstmCase("", 3, hidden, options, max(lengths), len(lengths), lengths, initial)
    actual, expected = (run(lstm, case.sample(dtype)) for lstm in case.pair(dtype))
    assert_same(actual, expected, dtype)
    alone = case.sample(dtype).leaf.transpose(0, case.time_dim)  # each sequence by itself
    ours, _ = case.pair(dtype)
    h_0, c_0 = case.sample(dtype).states or (None, None)
    for index, length in enumerate(lengths):
        states = None if h_0 is None else (h_0[:, index], c_0[:, index])
        _, (h_n, c_n) = ours(alone[:length, index], states)
        assert_same(
            {"h_n": h_n, "c_n": c_n},
            {"h_n": actual["h_n"][:, index], "c_n": actual["c_n"][:, index]},
            dtype,
        )

"""Attention against the reference in double precision, against stock, and as an operator."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock_attention
from torch.testing._internal.common_methods_invocations import op_db

from cards import BACKENDS, IS_SIMULATED, backends_and_dtypes, card, placed  # noqa: F401 (a fixture)
from fastopt import _native_cpu, use_backend
from fastopt.nn.functional import attention, scaled_dot_product_attention
from strategies import on_grid
from tolerances import (
    assert_as_near_as_stock,
    assert_matches,
    assert_no_worse_than_stock,
    assert_rounds_like_operands,
)

ROOT = Path(_native_cpu.__file__).parents[1]
WIDE = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """Sizes, options, and the shape of a mask."""

    sizes: tuple[int, int, int, int, int, int, int]  # batch, heads, key heads, q, k, features, of v
    options: dict[str, Any] = {}  # noqa: RUF012 (of a tuple)
    mask: tuple[int, ...] | None = None
    boolean: bool = False


USUAL = (2, 4, 4, 50, 70, 32, 32)
CASES = {
    "plain": Case(USUAL),
    "one of everything": Case((1, 1, 1, 1, 1, 1, 1)),
    "odd": Case((1, 3, 3, 13, 11, 7, 5)),
    "several tiles": Case((1, 2, 2, 130, 521, 64, 40)),
    "wide": Case((1, 1, 1, 20, 30, 200, 136)),
    "causal": Case((1, 2, 2, 300, 300, 16, 16), {"causal": True}),
    "causal, more queries": Case((2, 2, 2, 90, 40, 16, 16), {"causal": True}),
    "causal, more keys": Case((2, 2, 2, 40, 290, 16, 16), {"causal": True}),
    "window": Case((1, 2, 2, 300, 300, 16, 16), {"window_size": (37, 11)}),
    "window to the left": Case((1, 2, 2, 5, 300, 16, 16), {"window_size": (20, 0)}),
    "window beyond the keys": Case((1, 2, 2, 70, 20, 16, 16), {"window_size": (3, 2)}),
    "softcap": Case(USUAL, {"softcap": 1.5}),
    "alibi": Case(USUAL, {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0])}),
    "negative scale": Case(USUAL, {"scale": -0.7}),
    "groups": Case((2, 6, 2, 50, 70, 24, 24)),
    "bias": Case(USUAL, mask=(2, 4, 50, 70)),
    "bias of heads": Case(USUAL, mask=(4, 50, 70)),
    "bias for all": Case(USUAL, mask=(50, 70)),
    "bias of keys": Case(USUAL, mask=(2, 1, 1, 70)),
    "bias of queries": Case(USUAL, mask=(2, 4, 50, 1)),
    "bias of groups": Case((2, 6, 3, 20, 30, 8, 8), mask=(2, 1, 20, 30)),
    "allowed": Case(USUAL, mask=(2, 1, 50, 70), boolean=True),
    "rows that see nothing": Case(USUAL, mask=(2, 1, 50, 1), boolean=True),
    "keys that nobody sees": Case(USUAL, mask=(1, 70), boolean=True),
    "everything": Case(
        (2, 4, 2, 60, 90, 24, 40),
        {"causal": True, "softcap": 3.0, "alibi_slopes": torch.rand(2, 4), "dropout_p": 0.2},
        mask=(4, 60, 90),
    ),
    "dropout": Case((2, 4, 4, 50, 170, 32, 32), {"dropout_p": 0.3}),
    "most queries see nothing": Case((1, 2, 2, 300, 3, 64, 64), {"causal": True}),
    "one query": Case((2, 4, 2, 1, 700, 64, 64)),
    "few queries": Case((2, 2, 2, 3, 301, 33, 70), {"causal": True}),
}


def tensors(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Query, key and value; a mask; the gradient of the output. Values that the dtype has."""
    batch, heads, key_heads, queries, keys, features, value_features = case.sizes
    shapes = (
        (batch, heads, queries, features),
        (batch, key_heads, keys, features),
        (batch, key_heads, keys, value_features),
    )
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    gradient = torch.randn(batch, heads, queries, value_features).to(dtype)
    mask = None
    if case.mask is not None:
        mask = torch.rand(case.mask) > 0.4 if case.boolean else torch.randn(case.mask).to(dtype)
    return inputs, mask, gradient


def run(
    case: Case, dtype: torch.dtype, backend: str, given: tuple[Any, ...] | None = None
) -> dict[str, Tensor]:
    """What ``run_there`` gives, on the CPU."""
    return {name: result.cpu() for name, result in run_there(case, dtype, backend, given).items()}


def run_there(
    case: Case, dtype: torch.dtype, backend: str, given: tuple[Any, ...] | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients, by name; the reference computes in double precision throughout."""
    inputs, mask, gradient = placed(given or tensors(case, dtype), backend)
    wide = torch.float64 if backend == "reference" else dtype
    leaves = dict(zip("qkv", [x.to(wide).requires_grad_() for x in inputs], strict=True))
    if mask is not None and not case.boolean:
        mask = mask.to(wide).requires_grad_()
        leaves["mask"] = mask
    torch.manual_seed(3)
    output, logsumexp = attention(
        leaves["q"], leaves["k"], leaves["v"], attn_mask=mask, return_lse=True, backend=backend,
        **placed(case.options, backend),
    )  # fmt: skip
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient.to(wide))
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), "logsumexp": logsumexp, **named}


def table_of(result: str) -> str:
    """The row of the tolerances for a result of ``run``."""
    return "attention gradients" if result.startswith("gradient") else "attention"


def size_of_mask_terms(case: Case, given: tuple[Any, ...]) -> Tensor:
    """Largest sum of magnitudes in a mask's gradient: over all keys the terms cancel."""
    inputs, mask, gradient = given
    if mask is None or case.boolean:
        return torch.zeros(())
    batch, heads, _, queries, keys, *_ = case.sizes
    full = mask.double().expand(batch, heads, queries, keys).clone()
    alone = run(case, torch.float64, "reference", (inputs, full, gradient))["gradient of mask"]
    return alone.abs().sum_to_size(mask.shape).max()


@pytest.mark.usefixtures("card")
@backends_and_dtypes([*WIDE, *NARROW])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, backend: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given = tensors(case, dtype)
    actual, expected = run(case, dtype, backend, given), run(case, dtype, "reference", given)
    sizes = {"gradient of mask": size_of_mask_terms(case, given)}
    for key, value in expected.items():
        ours = actual[key]
        if key == "logsumexp":
            precise = torch.float64 if dtype is torch.float64 else torch.float32
            assert_matches(ours, value.to(precise), op="attention", dtype=precise)
        elif dtype in WIDE:
            assert_matches(ours, value.to(dtype), op=table_of(key), dtype=dtype)
        else:
            size = sizes.get(key, value.abs().max())
            assert_rounds_like_operands(ours, value, size)


@pytest.mark.usefixtures("card")
@backends_and_dtypes([*WIDE, *NARROW])
@pytest.mark.parametrize("name", ["one query", "few queries", "one of everything"])
def test_inference_agrees_with_the_reference(name: str, backend: str, dtype: torch.dtype) -> None:
    """Without gradients, few queries take another way on a CPU."""
    case = CASES[name]
    inputs, _, _ = tensors(case, dtype)
    results = attention(*placed(inputs, backend), return_lse=True, backend=backend, **case.options)
    output, logsumexp = [result.cpu() for result in results]
    wide = [tensor.double() for tensor in inputs]
    truth, sums = attention(*wide, return_lse=True, backend="reference", **case.options)
    precise = torch.float64 if dtype is torch.float64 else torch.float32
    assert_matches(logsumexp, sums.to(precise), op="attention", dtype=precise)
    if dtype in WIDE:
        assert_matches(output, truth.to(dtype), op="attention", dtype=dtype)
    else:
        assert_rounds_like_operands(output, truth, truth.abs().max())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_low_precision_is_no_worse_than_stock(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 100, 40).to(dtype) for _ in range(3))
    truth = stock_attention(query.double(), key.double(), value.double(), is_causal=True)
    actual = scaled_dot_product_attention(query, key, value, is_causal=True)
    stock = stock_attention(query, key, value, is_causal=True)
    assert_no_worse_than_stock(actual, stock, truth)


SDPA = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def _doubled(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_samples_of_torch(dtype: torch.dtype) -> None:
    calls = (
        (scaled_dot_product_attention, False),
        (stock_attention, False),
        (stock_attention, True),
    )
    # By what was computed and by whom: all samples. Who is nearer in one of them is luck.
    found: dict[int, list[list[Tensor]]] = {}
    samples = [
        sample
        for sample in SDPA.sample_inputs("cpu", dtype, requires_grad=True)
        if not sample.kwargs.get("dropout_p", 0)
    ]
    assert len(samples) > 4
    for sample in samples:
        for number, (function, wide) in enumerate(calls):
            given, keywords = [sample.input, *sample.args], dict(sample.kwargs)
            if wide:
                given = [_doubled(t) for t in given]
                keywords = {name: _doubled(value) for name, value in keywords.items()}
            output = function(*given, **keywords)
            leaves = [t for t in (*given, *keywords.values()) if isinstance(t, Tensor)]
            leaves = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = torch.autograd.grad(output.sin().sum(), leaves)
            for place, result in enumerate([output, *gradients]):
                found.setdefault(place, [[], [], []])[number].append(result.detach().flatten())
    for parts in found.values():
        actual, stock, truth = (torch.cat(part) for part in parts)
        if dtype is torch.float64:
            assert_matches(actual, truth, op="attention", dtype=dtype)
        else:
            assert_as_near_as_stock(actual, stock, truth)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_sizes_and_strides(backend: str) -> None:
    examples = 10 if backend == "triton" and IS_SIMULATED else 60  # the interpreter takes a second

    @settings(max_examples=examples, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        _check_sizes_and_strides(backend, data)

    check()


def _check_sizes_and_strides(backend: str, data: st.DataObject) -> None:
    small = st.integers(1, 40)
    group, key_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    batch = data.draw(st.integers(1, 2))
    queries, keys, features = (data.draw(small) for _ in range(3))
    case = Case(
        (batch, group * key_heads, key_heads, queries, keys, features, data.draw(small)),
        {
            "causal": data.draw(st.booleans()),
            "window_size": data.draw(st.sampled_from([(-1, -1), (5, 3), (0, 0)])),
        },
        mask=data.draw(st.sampled_from([None, (queries, keys)])),
        boolean=data.draw(st.booleans()),
    )
    inputs, mask, gradient = tensors(case, torch.float32)
    # Sums of products are exact then: a query that sees one key has a gradient of 0, no roundings.
    *inputs, gradient = map(on_grid, (*inputs, gradient))
    expected = run(case, torch.float32, "reference", (inputs, mask, gradient))
    # The layout that a module has: heads beside each other, or features not contiguous at all.
    order = data.draw(st.sampled_from([(0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)]))
    back = [order.index(i) for i in range(4)]
    inputs = [x.permute(order).contiguous().permute(back) for x in inputs]
    gradient = gradient.permute(order).contiguous().permute(back)
    actual = run(case, torch.float32, backend, (inputs, mask, gradient))
    for key, value in expected.items():
        assert_matches(actual[key], value.float(), op=table_of(key), dtype=torch.float32)


@pytest.mark.parametrize("name", ["causal", "groups", "everything", "bias for all"])
def test_bits_do_not_depend_on_the_threads(name: str) -> None:
    given = tensors(CASES[name], torch.float32)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(CASES[name], torch.float32, "cpu", given))
    for one, other in itertools.pairwise(results):
        for key in one:
            assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("isa", _native_cpu.instruction_sets)
def test_each_instruction_set(isa: str) -> None:
    program = (
        "import torch, test_attention as t, test_attention_sequences as s\n"
        "for name in ('plain', 'odd', 'everything', 'one query'):\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        t.test_agrees_with_the_reference(name, 'cpu', dtype)\n"
        "for dtype in s.DTYPES:\n"
        "    s.test_few_queries_over_keys_that_are_split(8, 'cpu', dtype)\n"
        "    s.test_sequences_agree_with_the_reference('sinks', 'cpu', dtype)\n"
        "print(t._native_cpu.instruction_set)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FASTOPT_CPU_ISA": isa, "PYTHONPATH": str(ROOT)},
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(isa)


def test_dropout_is_torchs_to_seed_and_drops_what_it_says() -> None:
    query, key = torch.zeros(1, 4, 200, 8), torch.zeros(1, 4, 500, 8)
    value = torch.eye(500).expand(1, 4, 500, 500)

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return scaled_dot_product_attention(query, key, value, dropout_p=0.3)

    first, second = weights(1), weights(1)
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(2))
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / (500 * 0.7)))
    total = kept.numel()
    spread = (total * 0.3 * 0.7) ** 0.5
    assert abs(int(kept.sum()) - 0.7 * total) < 5 * spread
    # Neighbours, in rows, columns and heads, know nothing of each other.
    both = 0.49 * total
    for dim in (1, 2, 3):
        pairs = (kept & kept.roll(1, dim)).sum()
        assert abs(int(pairs) - both) < 6 * (total * 0.49 * 0.51) ** 0.5


def test_dropout_of_the_stream_of_philox() -> None:
    """The known answer of Philox 4x32 with seven rounds for counter and key of zeros."""
    words = torch.empty((1, 64), dtype=torch.int32)
    _native_cpu.random_words(0, 0, 0, words)
    found = [int(words[0, 16 * i]) & 0xFFFFFFFF for i in range(4)]
    assert found == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("name", ["query", "key", "value", "mask"])
def test_nan_propagates(name: str) -> None:
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    mask = torch.zeros(40, 40)
    poisoned = {"query": query, "key": key, "value": value, "mask": mask}[name]
    poisoned.view(-1)[5] = torch.nan
    actual = scaled_dot_product_attention(query, key, value, mask)
    expected = stock_attention(query.double(), key.double(), value.double(), mask.double())
    assert torch.equal(actual.isnan(), expected.isnan())


def test_a_row_of_nothing_but_nan_is_nan() -> None:
    query = torch.full((1, 1, 20, 8), torch.nan)
    key = value = torch.randn(1, 1, 20, 8)
    assert scaled_dot_product_attention(query, key, value).isnan().all()


def test_gradcheck_and_gradgradcheck() -> None:
    inputs = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5)]
    bias = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attention(query, key, value, attn_mask=bias, softcap=2.0, causal=True)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(call, (*inputs, bias))
    assert torch.autograd.gradgradcheck(call, (*inputs, bias))


def test_inputs_may_be_made_from_each_other() -> None:
    leaf = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def gradient(create_graph: bool) -> Tensor:
        output = scaled_dot_product_attention(leaf, leaf * 2, leaf.sin())
        return torch.autograd.grad(output.sin().sum(), leaf, create_graph=create_graph)[0]

    assert_matches(gradient(True), gradient(False), op="attention", dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: scaled_dot_product_attention(x, x * 2, x), leaf)


def test_gradients_of_several_outputs_at_once() -> None:
    inputs = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5)]
    output = scaled_dot_product_attention(*inputs)
    several = torch.randn(3, *output.shape, dtype=torch.float64)
    batched = torch.autograd.grad(output, inputs, several, is_grads_batched=True, retain_graph=True)
    for number, one in enumerate(several):
        alone = torch.autograd.grad(output, inputs, one, retain_graph=True)
        for found, expected in zip(batched, alone, strict=True):
            assert torch.equal(found[number], expected)


def test_traces() -> None:
    query = torch.randn(1, 2, 6, 4)
    traced = torch.jit.trace(lambda x: scaled_dot_product_attention(x, x, x) * 1, query)
    other = torch.randn(1, 2, 6, 4)
    assert torch.equal(traced(other), scaled_dot_product_attention(other, other, other))


@pytest.mark.parametrize("keys", [5, 35, 65])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.1}], ids=str)
def test_the_last_word_of_an_odd_number_of_keys(keys: int, options: dict[str, Any]) -> None:
    """A word of two bf16 factors is multiplied whole: what fills it up must be a zero."""
    given = [torch.full((1, 1, 70, 16), 10.0), torch.full((1, 1, keys, 16), -10.0)]
    given += [torch.randn(1, 1, keys, 16)]
    inputs = [tensor.bfloat16() for tensor in given]
    case = Case((1, 1, 1, 70, keys, 16, 16), options)
    everything = (inputs, None, torch.randn(1, 1, 70, 16).bfloat16())
    actual = run(case, torch.bfloat16, "cpu", everything)
    for name, value in run(case, torch.bfloat16, "reference", everything).items():
        # All keys are equal: where gradients cancel, what is left is rounding of their terms.
        cancels = name in ("gradient of q", "gradient of k")
        if name == "logsumexp":
            assert_matches(actual[name], value.float(), op="attention", dtype=torch.float32)
        else:
            size = torch.tensor(10.0) if cancels else value.abs().max()
            assert_rounds_like_operands(actual[name], value, size)


@pytest.mark.parametrize("window", [(sys.maxsize, 0), (-1, sys.maxsize), (sys.maxsize, -1)])
def test_windows_may_be_as_wide_as_numbers_go(window: tuple[int, int]) -> None:
    case = Case((1, 1, 1, 6, 6, 8, 8), {"window_size": window})
    given = tensors(case, torch.float32)
    expected = run(case, torch.float32, "reference", given)
    for name, value in run(case, torch.float32, "cpu", given).items():
        assert_matches(value, expected[name].float(), op=table_of(name), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_mask_of_the_least_number_is_no_infinity(dtype: torch.dtype) -> None:
    """The mask that many models give a padded row: all of its keys count alike."""
    query = torch.randn(1, 1, 6, 8).to(dtype)
    mask = torch.zeros(6, 6, dtype=dtype)
    mask[2] = torch.finfo(dtype).min
    actual = scaled_dot_product_attention(query, query, query, mask)
    stock = stock_attention(query, query, query, mask)
    if dtype is torch.float64:
        assert_matches(actual, stock, op="attention", dtype=dtype)
    else:
        exact = query.double()
        truth = stock_attention(exact, exact, exact, mask.double())
        assert_no_worse_than_stock(actual, stock, truth)


@pytest.mark.parametrize("width", [1, 5, 19, 64])
@pytest.mark.parametrize("queries", [1, 7])
def test_subnormal_halves_are_numbers(queries: int, width: int) -> None:
    """They are no subnormals of what computes, and models have them: of one key, what it holds."""
    query, key = torch.ones(1, 1, queries, 3).half(), torch.ones(1, 1, 1, 3).half()
    value = (torch.arange(1, width + 1) * 2.0**-24).half().view(1, 1, 1, width)
    actual = attention(query, key, value, backend="cpu")
    assert torch.equal(actual, value.expand(1, 1, queries, width))


@pytest.mark.parametrize("size", [5e3, 5e5, 1e10])
@pytest.mark.parametrize("queries", [2, 40])
def test_scores_may_be_large(size: float, queries: int) -> None:
    """One key has all the weight, and that is 1, however large the rounding of its score."""
    inputs = [torch.randn(1, 2, n, 16) for n in (queries, 50, 50)]
    inputs[0] *= size
    gradient = torch.randn(1, 2, queries, 16)

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = function(*leaves)
        return [output, torch.autograd.grad(output, leaves[2], gradient.to(dtype))[0]]

    actual = results(scaled_dot_product_attention, torch.float32)
    stock = results(stock_attention, torch.float32)
    truth = results(stock_attention, torch.float64)
    for ours, theirs, exact in zip(actual, stock, truth, strict=True):
        assert_no_worse_than_stock(ours, theirs, exact)


def test_a_cap_that_is_far_away_is_none() -> None:
    query = torch.randn(1, 1, 6, 8)
    assert_matches(
        attention(query, query, query, softcap=1e38), attention(query, query, query),
        op="attention", dtype=torch.float32,
    )  # fmt: skip


def test_opcheck() -> None:
    inputs = [torch.randn(1, 2, n, 3, requires_grad=True) for n in (4, 5, 5)]
    bias = torch.randn(1, 1, 4, 5, requires_grad=True)
    nothing = (None,) * 6
    arguments = (
        *inputs,
        bias,
        *nothing,
        torch.tensor(3),
        0.2,
        0.5,
        0.0,
        -1,
        0,
        False,
        False,
        "cpu",
    )
    torch.library.opcheck(torch.ops.fastopt.attention, arguments)


def test_fake_results_are_laid_out_as_the_real_ones() -> None:
    inputs = [torch.randn(1, 2, 3, n).mT.requires_grad_() for n in (4, 5, 5)]
    bias = torch.randn(1, 1, 1, 5).expand(1, 1, 4, 5).requires_grad_()
    arguments = (*inputs, bias, *(None,) * 7, 0.0, 0.5, 0.0, -1, -1, False, False, "cpu")
    torch.library.opcheck(torch.ops.fastopt.attention, arguments)


def test_compiles_into_one_graph() -> None:
    inputs = [torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3)]

    def call(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*tensors, is_causal=True).sin().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*inputs), inputs)
    gradients = torch.autograd.grad(compiled(*inputs), inputs)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_matches(actual, wanted, op="attention", dtype=torch.float32)


def test_compiles_with_dropout() -> None:
    query = torch.randn(2, 3, 20, 8)
    compiled = torch.compile(
        lambda x: scaled_dot_product_attention(x, x, torch.ones_like(x), dropout_p=0.5),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    output = compiled(query)
    assert output.std() > 0 and abs(output.mean() - 1) < 0.2


@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual", "grad"])
def test_transforms_go_to_torch(transform: str) -> None:
    inputs = tuple(torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))

    def outcome(function: Any) -> Tensor:
        if transform == "vmap":
            return torch.vmap(function)(*[x[None].expand(2, *x.shape) for x in inputs])
        if transform == "jvp":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return torch.func.jvp(function, inputs, inputs)[1]
        if transform == "dual":
            from torch.autograd import forward_ad

            with (
                forward_ad.dual_level(),
                torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            ):
                duals = [forward_ad.make_dual(x, x) for x in inputs]
                return forward_ad.unpack_dual(function(*duals)).tangent
        return torch.func.grad(lambda *x: function(*x).sin().sum())(*inputs)

    assert_matches(
        outcome(scaled_dot_product_attention), outcome(stock_attention), op="attention",
        dtype=torch.float64,
    )  # fmt: skip


def test_autocast_as_stock() -> None:
    query, key, value = (torch.randn(1, 2, 30, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = scaled_dot_product_attention(query, key, value)
        stock = stock_attention(query, key, value)
    assert actual.dtype is stock.dtype is torch.bfloat16
    rounded = [tensor.bfloat16().double() for tensor in (query, key, value)]
    assert_no_worse_than_stock(actual, stock, stock_attention(*rounded))


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 4, 8), (2, 3, 5, 7), (2, 3, 5, 8)],
        [(2, 3, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8)],
        [(8,), (8,), (8,)],
    ],
)
def test_errors_are_torchs(shapes: list[tuple[int, ...]]) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    with pytest.raises(Exception) as stock:
        stock_attention(*inputs)
    with pytest.raises(type(stock.value)) as ours:
        scaled_dot_product_attention(*inputs)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("sink", [None, 0.5])
def test_empty_ones_are_zeros(sizes: tuple[int, int, int], sink: float | None) -> None:
    batch, queries, keys = sizes
    leaves = [torch.randn(batch, 2, n, 8, requires_grad=True) for n in (queries, keys, keys)]
    assert torch.equal(scaled_dot_product_attention(*leaves), stock_attention(*leaves))
    sinks = None if sink is None else torch.full((2,), sink)
    output, logsumexp = attention(
        *leaves, causal=True, softcap=1.0, learnable_sink=sinks, return_lse=True
    )
    assert output.shape == (batch, 2, queries, 8) and not output.any()
    expected = torch.full((batch, 2, queries), -torch.inf if sink is None else sink)
    assert torch.equal(logsumexp, expected)
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert not gradient.any()


def test_meta_tensors_as_stock() -> None:
    inputs = [torch.empty(2, 3, 4, 8, device="meta") for _ in range(3)]
    assert scaled_dot_product_attention(*inputs).shape == stock_attention(*inputs).shape


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)])
def test_outputs_are_laid_out_as_stocks(order: tuple[int, ...]) -> None:
    back = [order.index(i) for i in range(4)]
    query = torch.randn(2, 3, 5, 8).permute(order).contiguous().permute(back)
    actual = scaled_dot_product_attention(query, query, query)
    assert actual.stride() == stock_attention(query, query, query).stride()


@pytest.mark.parametrize(
    ("query_shape", "shape"),
    [((1, 2, 4, 8), (4,)), ((1, 2, 4, 8), ()), ((2, 4, 8), (1, 1, 4, 4))],
)
def test_masks_of_other_dimensions_as_stock(
    query_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Which of them stock refuses, and how, is its versions' to say."""
    query, mask = torch.randn(query_shape), torch.randn(shape)

    def outcome(function: Any) -> Tensor | tuple[type, str]:
        try:
            result: Tensor = function(query, query, query, mask)
        except (RuntimeError, IndexError) as error:
            return type(error), str(error)
        return result

    actual, expected = outcome(scaled_dot_product_attention), outcome(stock_attention)
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert_matches(actual, expected, op="attention", dtype=torch.float32)
    else:
        assert actual == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\), got 1.5"),
        ({"window_size": 5}, r"window_size must be a pair of whole numbers from -1 on, got 5"),
        ({"backend": "gpu"}, "gpu"),
        ({"window_size": (3, -2)}, r"window_size must be .* from -1 on, got \(3, -2\)"),
        ({"attn_mask": torch.zeros(4)}, r"attn_mask must have 2 to 4 dimensions, got \(4,\)"),
        ({"softcap": -1.0}, "softcap must be finite and not negative, got -1.0"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be \[heads\].*got \(3,\)"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], text: str) -> None:
    inputs = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=text):
        attention(*inputs, **options)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([(4, 2, 8)] * 3, r"query must have 4 dimensions, got shape \(4, 2, 8\)"),
        ([(1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 4, 8)], "value must have a row for each of key's"),
        ([(1, 2, 4, 8), (1, 2, 5, 7), (1, 2, 5, 8)], "key must have the features of query"),
        ([(1, 2, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8)], "key must have the batch of query"),
        ([(1, 4, 4, 8), (1, 3, 5, 8), (1, 3, 5, 8)], r"heads .* multiple .*key \(1, 3, 5, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: list[tuple[int, ...]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attention(*map(torch.randn, shapes))


def test_a_named_backend_does_not_fall_back() -> None:
    inputs = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"key has dtype torch\.float64"):
        scaled_dot_product_attention(inputs[0], inputs[1].double(), inputs[2])
    with pytest.raises(
        ValueError, match=r"attn_mask must broadcast to \(1, 2, 4, 4\), got \(3, 3\)"
    ):
        attention(*inputs, softcap=1.0, attn_mask=torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="torch has neither softcap nor ALiBi"):
        attention(*inputs, softcap=1.0, backend="torch")


def test_memory_does_not_grow_with_the_square_of_the_keys() -> None:
    """A table of the scores would take 256 MiB."""
    program = (
        "import resource, torch\n"
        "from fastopt.nn.functional import scaled_dot_product_attention as f\n"
        "q, k, v = (torch.randn(1, 1, 8192, 64, requires_grad=True) for _ in range(3))\n"
        "f(q[:, :, :64], k[:, :, :64], v[:, :, :64]).sum().backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "f(q, k, v, is_causal=True).sum().backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 100 * 1024  # KiB

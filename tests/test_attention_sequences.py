"""Attention over sequences of different lengths, over caches, and with sinks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock_attention

from cards import BACKENDS, backends_and_dtypes, card, placed  # noqa: F401 (a fixture)
from fastopt import use_backend
from fastopt.nn.functional import attention, scaled_dot_product_attention
from tolerances import assert_matches, assert_no_worse_than_stock, assert_rounds_like_operands

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
QUERIES, KEYS = [5, 0, 130, 1, 70], [9, 4, 300, 0, 70]
HEADS, KEY_HEADS, FEATURES, VALUE_FEATURES = 4, 2, 24, 20
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "dropout": {"dropout_p": 0.2},
    "slopes": {"alibi_slopes": torch.rand(len(QUERIES), HEADS), "softcap": 2.0},
    "sinks": {"learnable_sink": torch.tensor([0.0, 3.0, -2.0, -torch.inf]), "causal": True},
}


def starts(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def rows(dtype: torch.dtype, queries: int = sum(QUERIES), keys: int = sum(KEYS)) -> list[Tensor]:
    """Query, key, value and the gradient of the output, sequences behind each other."""
    shapes = (
        (queries, HEADS, FEATURES),
        (keys, KEY_HEADS, FEATURES),
        (keys, KEY_HEADS, VALUE_FEATURES),
        (queries, HEADS, VALUE_FEATURES),
    )
    return [torch.randn(shape).to(dtype) for shape in shapes]


def results(inputs: list[Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """Output, logsumexp and gradients by name; the reference computes in double precision."""
    *given, gradient = placed(inputs, backend)
    wide = torch.float64 if backend == "reference" else gradient.dtype
    leaves = dict(zip("qkv", [x.to(wide).requires_grad_() for x in given], strict=True))
    options = placed(options, backend)
    if (sink := options.get("learnable_sink")) is not None:
        leaves["sink"] = options["learnable_sink"] = sink.to(wide).requires_grad_()
    torch.manual_seed(3)
    output, logsumexp = attention(
        leaves["q"], leaves["k"], leaves["v"], return_lse=True, backend=backend, **options
    )
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient.to(wide))
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    found: dict[str, Tensor] = {"output": output.detach(), "logsumexp": logsumexp, **named}
    return {name: result.cpu() for name, result in found.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in expected.items():
        table = "attention gradients" if name.startswith("gradient") else "attention"
        precise = torch.float64 if dtype is torch.float64 else torch.float32
        if name == "logsumexp":
            assert_matches(actual[name], value.to(precise), op="attention", dtype=precise)
        elif dtype is precise:
            assert_matches(actual[name], value.to(dtype), op=table, dtype=dtype)
        else:
            assert_rounds_like_operands(actual[name], value, value.abs().max())


@pytest.mark.usefixtures("card")
@backends_and_dtypes(DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_sequences_agree_with_the_reference(name: str, backend: str, dtype: torch.dtype) -> None:
    given = rows(dtype)
    options = OPTIONS[name] | {"cu_seqlens_q": starts(QUERIES), "cu_seqlens_k": starts(KEYS)}
    expected = results(given, "reference", **options)
    assert_same(results(given, backend, **options), expected, dtype)


@pytest.mark.usefixtures("card")
@backends_and_dtypes(DTYPES)
def test_sequences_of_few_queries_over_caches(backend: str, dtype: torch.dtype) -> None:
    """As in decoding a batch of texts: one or some tokens each, and what is cached of each."""
    lengths, room, used = [1, 0, 4, 2], [20, 30, 600, 5], [17, 30, 555, 5]
    query, key, value, _ = rows(dtype, sum(lengths), sum(room))
    options: dict[str, Any] = {
        "cu_seqlens_q": starts(lengths), "cu_seqlens_k": starts(room), "causal": True,
        "cache_seqlens": torch.tensor(used), "return_lse": True,
    }  # fmt: skip
    on_device = placed([query, key, value], backend)
    outputs = attention(*on_device, backend=backend, **placed(options, backend))
    output, logsumexp = [result.cpu() for result in outputs]
    wide = [tensor.double() for tensor in (query, key, value)]
    truth, sums = attention(*wide, backend="reference", **options)
    actual = {"output": output, "logsumexp": logsumexp}
    assert_same(actual, {"output": truth, "logsumexp": sums}, dtype)


def test_each_sequence_is_as_alone() -> None:
    query, key, value, _ = rows(torch.float64)
    output, logsumexp = attention(
        query, key, value, causal=True, return_lse=True, max_seqlen_q=130, max_seqlen_k=512,
        cu_seqlens_q=starts(QUERIES, torch.int64), cu_seqlens_k=starts(KEYS, torch.int64),
    )  # fmt: skip
    assert output.shape == (sum(QUERIES), HEADS, VALUE_FEATURES)
    places = zip(starts(QUERIES).tolist(), starts(KEYS).tolist(), QUERIES, KEYS, strict=False)
    for first, first_key, queries, keys in places:
        own = output[first : first + queries]
        if keys == 0:
            assert not own.any()
            assert (logsumexp[:, first : first + queries] == -torch.inf).all()
            continue
        parts = (query[first : first + queries], key[first_key : first_key + keys])
        parts = (*parts, value[first_key : first_key + keys])
        alone = attention(
            *[part.transpose(0, 1)[None] for part in parts], causal=True, backend="reference"
        )
        assert_matches(own.transpose(0, 1), alone[0], op="attention", dtype=torch.float64)


def test_keys_follow_the_queries_where_nothing_else_is_said() -> None:
    query, key, value, _ = rows(torch.float32, sum(QUERIES), sum(QUERIES))
    own = {"cu_seqlens_q": starts(QUERIES)}
    both = own | {"cu_seqlens_k": starts(QUERIES)}
    assert torch.equal(attention(query, key, value, **own), attention(query, key, value, **both))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 3, 30])
def test_a_cache_is_used_as_far_as_it_is_filled(queries: int, backend: str) -> None:
    used = [7, 300, 40]
    query = torch.randn(3, HEADS, queries, FEATURES)
    key = torch.randn(3, KEY_HEADS, 320, FEATURES)
    value = torch.randn(3, KEY_HEADS, 320, VALUE_FEATURES)
    gradient = torch.randn(3, HEADS, queries, VALUE_FEATURES)
    mask = torch.randn(1, HEADS, queries, 320)
    options: dict[str, Any] = {"causal": True, "attn_mask": mask}
    actual = results(
        [query, key, value, gradient], backend, cache_seqlens=torch.tensor(used), **options
    )
    for number, count in enumerate(used):
        one = slice(number, number + 1)
        options["attn_mask"] = mask[..., :count].double()
        alone = results(
            [query[one], key[one, :, :count], value[one, :, :count], gradient[one]],
            "reference", **options,
        )  # fmt: skip
        mine = {name: tensor[one] for name, tensor in actual.items()}
        for name in ("gradient of k", "gradient of v"):
            assert not mine[name][:, :, count:].any()
            mine[name] = mine[name][:, :, :count]
        assert_same(mine, alone, torch.float32)
    filled = torch.tensor(used)
    decoded = attention(query, key, value, cache_seqlens=filled, causal=True, attn_mask=mask)
    assert_matches(decoded, actual["output"], op="attention", dtype=torch.float32)
    whole = attention(query, key, value, cache_seqlens=50)
    assert torch.equal(whole, attention(query, key[:, :, :50], value[:, :, :50]))


@pytest.mark.usefixtures("card")
@backends_and_dtypes(DTYPES)
@pytest.mark.parametrize("group", [1, 8])
def test_few_queries_over_keys_that_are_split(group: int, backend: str, dtype: torch.dtype) -> None:
    query = torch.randn(1, 2 * group, 2, 40).to(dtype)
    keys = 5000 if backend == "cpu" else 500  # simulated kernels take their time
    key, value = torch.randn(1, 2, keys, 40).to(dtype), torch.randn(1, 2, keys, 70).to(dtype)
    gradient = torch.randn(1, 2 * group, 2, 70).to(dtype)
    options = {"causal": True, "dropout_p": 0.1, "learnable_sink": torch.randn(2 * group)}
    expected = results([query, key, value, gradient], "reference", **options)
    assert_same(results([query, key, value, gradient], backend, **options), expected, dtype)
    torch.manual_seed(3)
    on_device = placed([query, key, value], backend)
    outputs = attention(*on_device, return_lse=True, backend=backend, **placed(options, backend))
    output, logsumexp = [result.cpu() for result in outputs]
    decoded = {"output": output, "logsumexp": logsumexp}
    assert_same(decoded, {name: expected[name] for name in decoded}, dtype)


def test_bits_do_not_depend_on_the_threads() -> None:
    split = [torch.randn(1, 2, n, 16) for n in (1, 3000, 3000)]
    options = OPTIONS["sinks"] | {"cu_seqlens_q": starts(QUERIES), "cu_seqlens_k": starts(KEYS)}
    given = rows(torch.float32)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append({"split": attention(*split), **results(given, "cpu", **options)})
    for one, other in itertools.pairwise(found):
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_a_sink_is_a_key_without_a_value() -> None:
    query, key, value = (torch.randn(2, HEADS, n, 8, dtype=torch.float64) for n in (40, 50, 50))
    sink = torch.randn(HEADS, dtype=torch.float64)
    scores = query @ key.mT / 8**0.5
    column = sink[:, None, None].expand(2, HEADS, 40, 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    actual = attention(query, key, value, learnable_sink=sink)
    assert_matches(actual, weights @ value, op="attention", dtype=torch.float64)
    hidden = torch.zeros(40, 50, dtype=torch.bool)
    output, logsumexp = attention(
        query, key, value, attn_mask=hidden, learnable_sink=sink, return_lse=True
    )
    assert not output.any()
    assert_matches(logsumexp, column.squeeze(-1).contiguous(), op="attention", dtype=torch.float64)


def test_gradcheck_of_sequences_and_sinks() -> None:
    own, other = [3, 1], [2, 4]
    inputs = [torch.randn(n, 2, 3, dtype=torch.float64) for n in (sum(own), sum(other))]
    inputs += [torch.randn(sum(other), 2, 2, dtype=torch.float64)]
    inputs += [torch.randn(2, dtype=torch.float64)]
    for leaf in inputs:
        leaf.requires_grad_()

    def call(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        return attention(  # type: ignore[return-value]
            query, key, value, cu_seqlens_q=starts(own), cu_seqlens_k=starts(other),
            learnable_sink=sink, window_size=(2, 1),
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("learned", [True, False])
def test_opcheck_of_every_tensor(learned: bool) -> None:
    query, key, value, _ = (tensor.transpose(0, 1)[None] for tensor in rows(torch.float32))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    slopes, sinks = torch.rand(len(QUERIES), HEADS), torch.rand(HEADS, dtype=torch.float64)
    sinks.requires_grad_(learned)
    others = (slopes, sinks, starts(QUERIES), starts(KEYS), torch.tensor([9, 2, 40, 0, 70]))
    numbers = (0.2, 0.5, 0.0, -1, 0, True, False, "cpu")
    arguments = (*inputs, None, None, *[t.int() if t.dtype is torch.int64 else t for t in others])
    torch.library.opcheck(torch.ops.fastopt.attention, (*arguments, torch.tensor(3), *numbers))


def jagged(parts: list[Tensor]) -> Tensor:
    """``[batch, heads, ragged, features]`` as a module makes it."""
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_jagged_tensors(causal: bool) -> None:
    """Stock refuses causal ones on a CPU."""
    parts = [[torch.randn(n, 3, 16) for n in (5, 130, 1)] for _ in range(3)]

    def run(dtype: torch.dtype, together: bool) -> list[Tensor]:
        leaves = [[p.detach().to(dtype).requires_grad_() for p in part] for part in parts]
        if together:
            with use_backend("cpu"):
                result = scaled_dot_product_attention(*map(jagged, leaves), is_causal=causal)
            assert result.is_nested and result.shape[:2] == (3, 3)
            outputs = list(result.transpose(1, 2).unbind())
        else:
            heads_first = [[t.transpose(0, 1) for t in part] for part in leaves]
            outputs = [
                stock_attention(*own, is_causal=causal).transpose(0, 1)
                for own in zip(*heads_first, strict=True)
            ]
        output = torch.cat(outputs)
        gradients = torch.autograd.grad(output.sin().sum(), list(itertools.chain(*leaves)))
        # All of them together: who is nearer in one is luck.
        return [output.detach(), torch.cat([g.flatten() for g in gradients])]

    results = run(torch.float32, True), run(torch.float32, False), run(torch.float64, False)
    for actual, stock, truth in zip(*results, strict=True):
        assert_no_worse_than_stock(actual, stock, truth)


def test_keys_and_values_of_other_lengths_are_refused_as_by_stock() -> None:
    query, key, value = (
        jagged([torch.randn(n, 2, 8) for n in lengths]) for lengths in ([3, 6], [3, 6], [4, 5])
    )
    with pytest.raises(RuntimeError) as stock:
        stock_attention(query, key, value)
    with pytest.raises(RuntimeError) as ours:
        scaled_dot_product_attention(query, key, value)
    assert type(ours.value) is type(stock.value)


def test_other_nested_tensors_are_torchs() -> None:
    parts = [torch.randn(3, n, 16) for n in (5, 30)]
    strided = torch.nested.nested_tensor(parts)
    actual = scaled_dot_product_attention(strided, strided, strided)
    for own, part in zip(actual.unbind(), parts, strict=True):
        assert_matches(own, stock_attention(*[part] * 3), op="attention", dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cu_seqlens_k": starts([4])}, "cu_seqlens_k needs cu_seqlens_q"),
        (
            {"learnable_sink": torch.ones(3)},
            r"learnable_sink must be real \[heads\], got torch.float32 \(3,\)",
        ),
        ({"cache_seqlens": torch.ones(3)}, r"cache_seqlens must .* got torch.float32 \(3,\)"),
        ({"cache_seqlens": 6}, r"cache_seqlens must .*, from 0 to its keys, got \[6\]"),
        ({"cache_seqlens": 2.7}, r"cache_seqlens must be a number or .*, got 2.7"),
        (
            {"cache_seqlens": torch.tensor([2**32 + 2])},
            r"cache_seqlens must fit 32 bits, got \[4294967298\]",
        ),
        ({"max_seqlen_q": 4}, "max_seqlen_q needs cu_seqlens_q, got 4 alone"),
        ({"cu_seqlens_q": starts([2, 2])}, r"query must have \[rows, heads, features\] with cu_"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], text: str) -> None:
    inputs = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=text):
        attention(*inputs, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cu_seqlens_q": starts([2, 1])}, r"cu_seqlens_q must begin with 0, .* the 4 rows .* 3\]"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 2, 4])}, r"cu_seqlens_q must .*got \[0, 3, 2, 4\]"),
        ({"cu_seqlens_q": torch.tensor([1, 4])}, r"cu_seqlens_q must begin with 0"),
        (
            {"cu_seqlens_q": torch.tensor([0, 2**32 + 4])},
            r"cu_seqlens_q must fit 32 bits, got \[0, 4294967300\]",
        ),
        ({"cu_seqlens_q": torch.tensor([0.0, 4.0])}, r"cu_seqlens_q must be int32 or int64"),
        (
            {"cu_seqlens_q": starts([4]), "cu_seqlens_k": starts([2, 2])},
            "cu_seqlens_q and cu_seqlens_k must be of one length",
        ),
        (
            {"cu_seqlens_q": starts([1, 3]), "max_seqlen_q": 2},
            "max_seqlen_q must be at least 3, the longest sequence, got 2",
        ),
        (
            {"cu_seqlens_q": starts([4]), "attn_mask": torch.zeros(4, 4)},
            "attn_mask does not go with cu_seqlens_q",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sequences_that_do_not_fit_are_named(
    options: dict[str, Any], text: str, backend: str
) -> None:
    inputs = [torch.randn(4, 2, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=text):
        attention(*inputs, **options, backend=backend)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "learnable_sink"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    inputs = [torch.randn(4, 2, 8) for _ in range(3)]
    with pytest.raises(TypeError, match=rf"{name} must be a tensor or None, got \[0, 4\]"):
        attention(*inputs, **{name: [0, 4]})


def test_torch_has_none_of_it() -> None:
    inputs = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with pytest.raises(RuntimeError, match="torch has no sinks"):
        attention(*inputs, learnable_sink=torch.ones(2), backend="torch")
    with pytest.raises(RuntimeError, match="torch has no cu_seqlens"):
        attention(*inputs, cache_seqlens=2, backend="torch")

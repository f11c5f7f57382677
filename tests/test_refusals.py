"""What the kernels do not take is left to torch, with a reason in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt.backends.attention_requests import refuse_attention
from fastopt.backends.contract import AttentionRequest, LinearCrossEntropyRequest, LstmRequest
from fastopt.backends.linear_cross_entropy_requests import refuse_linear_cross_entropy
from fastopt.backends.lstm_requests import refuse_lstm
from fastopt.backends.plain_tensors import REAL_DTYPES, not_plain
from fastopt.backends.registry import BACKENDS

INTEGERS = torch.int32


def named(value: Any) -> str:
    """Of a case: the arguments that it changes, or the reason."""
    return "-".join(value) if isinstance(value, dict) else str(value)[:32]


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


QUERY = zeros(2, 4, 3, 8)
ATTENTION = AttentionRequest(QUERY, zeros(2, 2, 5, 8), zeros(2, 2, 5, 6))
REFUSED_ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"query": QUERY.to("meta")}, "the queries are on meta"),
    ({"query": QUERY.to(torch.complex64)}, "no kernel has the dtype torch.complex64"),
    ({"key": zeros(2, 2, 5, 8, dtype=torch.float64)}, "key has dtype torch.float64 beside"),
    ({"allowed": zeros(1, 1, 3, 5)}, "attn_mask has dtype torch.float32 beside"),
    ({"used_keys": zeros(2)}, "cache_seqlens has dtype torch.float32 beside"),
    ({"slopes": zeros(2, 4).to_sparse()}, "alibi_slopes has layout"),
    ({"query": QUERY[0]}, "not all of 4 dimensions"),
    ({"query": zeros(2, 4, 3, 0), "key": zeros(2, 2, 5, 0)}, "no heads or no features"),
    ({"key": zeros(2, 2, 5, 7)}, "do not fit each other"),
    ({"value": zeros(2, 2, 4, 6)}, "do not fit each other"),
    ({"query": zeros(2, 3, 3, 8)}, "3 heads of query are no multiple of 2 of key"),
    ({"bias": zeros(2, 4, 2, 5)}, "attn_mask of shape (2, 4, 2, 5) does not fit scores"),
    ({"bias": zeros(3, 5)}, "attn_mask of shape (3, 5) does not fit scores"),
    (
        {"bias": zeros(1, 1, 3, 5), "query_starts": zeros(3, dtype=INTEGERS)},
        "attn_mask does not go with cu_seqlens_q",
    ),
    ({"dropout": 1.0}, "dropout_p is 1.0"),
]

# Two layers of hidden size 4 over an input of 3 features, with biases.
STATE = zeros(2, 5, 4)
WEIGHTS = [zeros(*shape) for wide in (3, 4) for shape in ((16, wide), (16, 4), (16,), (16,))]
LSTM = LstmRequest(zeros(6, 5, 3), None, STATE, STATE, WEIGHTS, True, 2, False)
UNFIT = "the sizes of input, states and weights do not fit each other"
REFUSED_LSTM: list[tuple[dict[str, Any], str]] = [
    ({"input": LSTM.input.to("meta")}, "the input is on meta"),
    ({"input": LSTM.input.to(torch.complex64)}, "no kernel has the dtype torch.complex64"),
    ({"input": LSTM.input.to(torch.float64)}, "tensors are torch.float64 and torch.float32"),
    ({"initial_cell": STATE.to_sparse()}, "a tensor has layout torch.sparse_coo"),
    ({"weights": WEIGHTS[:-2]}, UNFIT),
    ({"input": zeros(5, 3)}, UNFIT),
    ({"initial_hidden": STATE[0]}, UNFIT),
    ({"input": zeros(0, 5, 3)}, "there is nothing to compute"),
    ({"input": zeros(6, 4, 3)}, UNFIT),
    ({"input": zeros(12, 3), "batch_sizes": torch.tensor([4, 4, 4])}, UNFIT),
    ({"initial_cell": zeros(1, 5, 4)}, UNFIT),
    ({"initial_hidden": zeros(2, 5, 3)}, UNFIT),
    ({"weights": [zeros(16, 2), *WEIGHTS[1:]]}, UNFIT),
]

CROSS_ENTROPY = LinearCrossEntropyRequest(zeros(5, 8), zeros(7, 8), zeros(5, dtype=torch.int64))
REFUSED_CROSS_ENTROPY: list[tuple[dict[str, Any], str]] = [
    ({"input": zeros(5, 8, device="meta")}, "the input is on meta"),
    ({"input": zeros(5, 8, dtype=INTEGERS)}, "no kernel has the dtype torch.int32"),
    ({"linear_weight": zeros(7, 2, 8)}, "a K-dimensional loss is torch's"),
    ({"linear_bias": zeros(7, dtype=torch.float64)}, "linear_bias has dtype torch.float64"),
    ({"target": zeros(5)}, "target has dtype torch.float32"),
    ({"weight": zeros(7).to_sparse()}, "weight has layout torch.sparse_coo"),
    ({"weight": zeros(7, requires_grad=True)}, "the gradient of weight is torch's"),
    ({"target": zeros(5, 7, requires_grad=True)}, "the gradient of target is torch's"),
    ({"linear_weight": zeros(7, 0)}, "there are no classes or no features"),
    ({"target": zeros(4, dtype=torch.int64)}, "target has shape (4,) beside 5 rows of input"),
    ({"weight": zeros(6)}, "weight has shape (6,) beside 7 classes"),
    ({"reduction": "max"}, "reduction is 'max'"),
    ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED_ATTENTION, ids=named)
def test_attention(changes: dict[str, Any], reason: str) -> None:
    assert refuse_attention(ATTENTION, "cpu", REAL_DTYPES) is None
    refused = refuse_attention(dataclasses.replace(ATTENTION, **changes), "cpu", REAL_DTYPES)
    assert refused is not None and reason in refused


@pytest.mark.parametrize(("changes", "reason"), REFUSED_LSTM, ids=named)
def test_lstm(changes: dict[str, Any], reason: str) -> None:
    assert refuse_lstm(LSTM, "cpu") is None
    refused = refuse_lstm(dataclasses.replace(LSTM, **changes), "cpu")
    assert refused is not None and reason in refused


@pytest.mark.parametrize(("changes", "reason"), REFUSED_CROSS_ENTROPY, ids=named)
def test_linear_cross_entropy(changes: dict[str, Any], reason: str) -> None:
    assert refuse_linear_cross_entropy(CROSS_ENTROPY, "cpu") is None
    refused = refuse_linear_cross_entropy(dataclasses.replace(CROSS_ENTROPY, **changes), "cpu")
    assert refused is not None and reason in refused


def test_autocast_of_packed_sequences() -> None:
    packed = dataclasses.replace(LSTM, input=zeros(10, 3), batch_sizes=torch.tensor([5, 5]))
    assert refuse_lstm(packed, "cpu") is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused = refuse_lstm(packed, "cpu")
    assert refused == "autocast of packed sequences and of projections is torch's"


def test_forward_mode_differentiation() -> None:
    cpu, requests = BACKENDS["cpu"], (ATTENTION, LSTM, CROSS_ENTROPY)
    answers = cpu.supports_attention, cpu.supports_lstm, cpu.supports_linear_cross_entropy
    with torch.autograd.forward_ad.dual_level():
        reasons = [answer(request) for answer, request in zip(answers, requests, strict=True)]
    assert all(reason is not None and "forward-mode" in reason for reason in reasons)
    assert all(answer(request) is None for answer, request in zip(answers, requests, strict=True))


class _Subclass(Tensor):
    pass


PLAIN = zeros(2, 2, dtype=torch.complex64)
REFUSED_TENSORS: list[tuple[Tensor, str]] = [
    (PLAIN.as_subclass(_Subclass), "it is a _Subclass, a subclass of torch.Tensor"),
    (PLAIN.to("meta"), "it is on meta"),
    (PLAIN.to_sparse(), "it has layout torch.sparse_coo"),
    (zeros(2, dtype=torch.int64), "it has dtype torch.int64"),
    (PLAIN.conj(), "it is a lazily conjugated or negated view"),
    (torch._efficientzerotensor((2,)), "it has no memory"),
    (zeros(*[1] * 64, dtype=torch.complex64), "it has 64 dimensions"),
]


@pytest.mark.parametrize(("tensor", "reason"), REFUSED_TENSORS, ids=named)
def test_tensors(tensor: Tensor, reason: str) -> None:
    assert not_plain("it", PLAIN, "cpu") is None
    assert not_plain("it", tensor, "cpu") == reason


def test_tensors_inside_a_transform() -> None:
    reasons: list[str | None] = []

    def look(tensor: Tensor) -> Tensor:
        reasons.append(not_plain("it", tensor, "cpu"))
        return tensor

    torch.func.vmap(look)(zeros(2, 2))
    assert reasons == ["it is inside a torch.func transform"]

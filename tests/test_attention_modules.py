"""MultiheadAttention and the transformer layers against their torch twins."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tolerances import assert_matches

EMBEDDING, HEADS, BATCH, QUERIES, KEYS = 12, 3, 4, 7, 9

CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "other widths": {"kdim": 5, "vdim": 8},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
    "appended, batch first": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
MASKS = ("none", "bool", "float", "of heads")


def twins(**options: Any) -> tuple[torch.nn.MultiheadAttention, torch.nn.MultiheadAttention]:
    """Ours and stock's with the same parameters."""
    stock = torch.nn.MultiheadAttention(EMBEDDING, HEADS, dtype=torch.float64, **options)
    ours = fastopt.nn.MultiheadAttention(EMBEDDING, HEADS, dtype=torch.float64, **options)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def call(module: torch.nn.MultiheadAttention, masked: str, padded: str, batched: bool) -> Any:
    """The arguments of a call."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int, width: int) -> Tensor:
        shape = (BATCH, length, width) if module.batch_first else (length, BATCH, width)
        drawn = torch.randn(shape if batched else (length, width), generator=generator)
        return drawn.double().requires_grad_()

    batch = BATCH if batched else 1
    shape = (batch * HEADS, QUERIES, KEYS) if masked == "of heads" else (QUERIES, KEYS)
    mask: Tensor | None = torch.randn(shape, generator=generator).double()
    if masked == "bool":
        mask = mask > 1 if mask is not None else None
    padding: Tensor | None = torch.zeros((BATCH, KEYS) if batched else (KEYS,), dtype=torch.bool)
    assert padding is not None
    padding[..., -2:] = True
    if padded == "float":
        padding = torch.where(padding, -torch.inf, 0.0).double()
    inputs = draw(QUERIES, EMBEDDING), draw(KEYS, module.kdim), draw(KEYS, module.vdim)
    return inputs, {
        "attn_mask": None if masked == "none" else mask,
        "key_padding_mask": None if padded == "none" else padding,
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padded", ["none", "bool", "float"])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_multihead_agrees_with_stock(name: str, masked: str, padded: str) -> None:
    ours, stock = twins(**CONSTRUCTIONS[name])
    ways: list[dict[str, bool]] = [
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
    ]
    for batched, way in itertools.product((True, False), ways):
        results = []
        for module in (ours, stock):
            inputs, masks = call(module, masked, padded, batched)
            output, weights = module(*inputs, **masks, **way)
            loss = output.sin().sum() + (0 if weights is None else weights.cos().sum())
            leaves = [*inputs, *module.parameters()]
            gradients = torch.autograd.grad(loss, leaves)
            results.append([output, *([] if weights is None else [weights]), *gradients])
        for actual, expected in zip(*results, strict=True):
            assert_matches(actual, expected, op="attention", dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_self_attention_with_the_causal_hint(training: bool) -> None:
    ours, stock = twins(batch_first=True)
    inputs = torch.randn(BATCH, QUERIES, EMBEDDING, dtype=torch.float64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    for module in (ours, stock):
        module.train(training)
    actual, expected = (
        module(*[inputs] * 3, attn_mask=mask, is_causal=True, need_weights=False)[0]
        for module in (ours, stock)
    )
    assert_matches(actual, expected, op="attention", dtype=torch.float64)


def test_weights_are_those_that_were_summed_with() -> None:
    module = fastopt.nn.MultiheadAttention(EMBEDDING, 1, dropout=0.4, dtype=torch.float64)
    inputs = torch.randn(QUERIES, BATCH, EMBEDDING, dtype=torch.float64)
    output, weights = module(inputs, inputs, inputs)
    assert (weights == 0).any()
    value = torch.nn.functional.linear(
        inputs, module.in_proj_weight[-EMBEDDING:], module.in_proj_bias[-EMBEDDING:]
    )
    expected = module.out_proj(torch.einsum("nls,sne->lne", weights, value))
    assert_matches(output, expected, op="attention", dtype=torch.float64)


def test_errors_are_torchs() -> None:
    ours, stock = twins()
    good = torch.randn(QUERIES, BATCH, EMBEDDING, dtype=torch.float64)
    wrong: list[tuple[Any, dict[str, Any]]] = [
        ((good[..., :5], good, good), {}),
        ((good, good, good[:3]), {}),
        ((good, good, good), {"attn_mask": torch.zeros(2, 2, dtype=torch.float64)}),
        ((good, good, good), {"attn_mask": torch.zeros(QUERIES, QUERIES, dtype=torch.int32)}),
        ((good, good, good), {"is_causal": True}),
    ]
    for inputs, options in wrong:
        with pytest.raises(Exception) as expected:
            stock(*inputs, **options)
        with pytest.raises(type(expected.value)) as actual:
            ours(*inputs, **options)
        assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_layers_agree_with_stock(training: bool, norm_first: bool) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "norm_first": norm_first, "batch_first": True}
    source = torch.randn(BATCH, QUERIES, EMBEDDING)
    memory = torch.randn(BATCH, KEYS, EMBEDDING)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[0, -2:] = True
    for kind in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        results = []
        for namespace in (fastopt.nn, torch.nn):
            torch.manual_seed(5)
            layer = getattr(namespace, kind)(EMBEDDING, HEADS, 20, **options).train(training)
            if kind == "TransformerEncoderLayer":
                results.append(layer(source, src_key_padding_mask=padding)[~padding])
            else:
                results.append(layer(source, memory, tgt_key_padding_mask=padding)[~padding])
        assert_matches(results[0], results[1], op="attention", dtype=torch.float32)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_dropout_beside_attention_is_stocks(kind: str, batch_first: bool) -> None:
    """It draws in the order of memory, which a module's output has to share with stock's."""
    results = []
    for namespace in (fastopt.nn, torch.nn):
        torch.manual_seed(5)
        layer = getattr(namespace, kind)(EMBEDDING, HEADS, 20, 0.3, batch_first=batch_first)
        for module in layer.modules():
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        source = torch.randn(BATCH, QUERIES, EMBEDDING)
        results.append(layer(*[source] * (2 if "Decoder" in kind else 1)))
    assert_matches(results[0], results[1], op="attention", dtype=torch.float32)


def test_an_encoder_in_eval_calls_our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = fastopt.nn.MultiheadAttention.forward
    monkeypatch.setattr(
        fastopt.nn.MultiheadAttention,
        "forward",
        lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs),
    )
    layer = fastopt.nn.TransformerEncoderLayer(EMBEDDING, 2, 20, batch_first=True).eval()
    encoder = torch.nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        encoder(torch.randn(BATCH, QUERIES, EMBEDDING))
    assert len(calls) == 2


def test_copies_and_pickles() -> None:
    layer = fastopt.nn.TransformerEncoderLayer(EMBEDDING, HEADS, 20, batch_first=True).eval()
    source = torch.randn(BATCH, QUERIES, EMBEDDING)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied.self_attn) is fastopt.nn.MultiheadAttention
        assert torch.equal(copied(source), layer(source))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_inputs_beside_masks(shape: tuple[int, int], need_weights: bool) -> None:
    """Without weights, torch refuses them."""
    batch, length = shape
    module = fastopt.nn.MultiheadAttention(8, 2, batch_first=True)
    inputs = torch.randn(batch, length, 8)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    mask = torch.zeros(batch * 2, length, length)
    for masks in ({"key_padding_mask": padding}, {"attn_mask": mask}):
        output, _ = module(inputs, inputs, inputs, need_weights=need_weights, **masks)
        assert output.shape == inputs.shape

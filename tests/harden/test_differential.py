"""Ours beside stock on random calls: each pair of options, any shape and stride, odd values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock_attention
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from differential import (
    CASES,
    ODD_FACTORS,
    assert_agrees,
    assert_finite_alike,
    each_pair,
    pairs,
    portions,
    run_cases,
    with_odd,
)
from fastopt import nn, optim
from fastopt.nn.functional import scaled_dot_product_attention
from strategies import on_grid, sizes, strided

Tally = Callable[[str, int], None]
FLAG = (False, True)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RATES = {"lr": (1e-4, 0.01, 1.0), "weight_decay": (0.0, 1 / 64, 0.25), "maximize": FLAG}
EPS = (1e-8, 1e-3, 1.0)
MOMENTS = {**RATES, "betas": ((0.9, 0.999), (0.0, 0.5), (0.5, 0.75)), "eps": EPS}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {**RATES, "momentum": (0.0, 0.5, 0.9), "dampening": (0.0, 0.25), "nesterov": FLAG},
    "Adam": {**MOMENTS, "amsgrad": FLAG, "decoupled_weight_decay": FLAG},
    "AdamW": {**MOMENTS, "amsgrad": FLAG},
    "Adagrad": {**RATES, "lr_decay": (0.0, 0.25), "initial_accumulator_value": (0.0, 0.5),
                "eps": EPS},
    "RMSprop": {**RATES, "alpha": (0.5, 0.99), "eps": EPS, "momentum": (0.0, 0.5),
                "centered": FLAG},
    "Adamax": MOMENTS,
    "RAdam": {**MOMENTS, "decoupled_weight_decay": FLAG},
    "NAdam": {**MOMENTS, "decoupled_weight_decay": FLAG, "momentum_decay": (0.0, 0.25)},
}  # fmt: skip


def allowed(row: dict[str, Any]) -> dict[str, Any]:
    """Nesterov's momentum is one without dampening."""
    if row.get("nesterov"):
        return {**row, "momentum": row["momentum"] or 0.9, "dampening": 0.0}
    return dict(row)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, tally: Tally) -> None:
    classes = getattr(optim, name), getattr(torch.optim, name)

    def check(draw: Any, row: dict[str, Any]) -> None:
        options = allowed(row)
        dtype = options.pop("dtype")
        shape, portion = draw.of(sizes), draw.of(portions)
        values = with_odd(draw.of(strided(shape, dtype, True)), portion, draw.generator)
        params = [torch.nn.Parameter(values), torch.nn.Parameter(values.detach().clone())]
        params.append(torch.nn.Parameter(values.detach().double()))
        ours = classes[0]([params[0]], **options, backend="cpu")
        others = [classes[1]([param], **options, foreach=False) for param in params[1:]]
        for _ in range(2):
            grad = with_odd(draw.of(strided(shape, dtype, False)), portion, draw.generator)
            for param in params:
                param.grad = grad.to(param.dtype)
            before = params[1].detach().clone()
            with torch.no_grad():  # equal numbers before the step that is compared
                before = torch.where(before.isfinite(), on_grid(before), before)
                for param in params:
                    param.copy_(before)
            state = others[0].state[params[1]]
            for optimizer, param in ((ours, params[0]), (others[1], params[2])):
                for key, value in state.items():
                    optimizer.state[param][key].copy_(value)
            ours.step()
            for other in others:
                other.step()
            assert_agrees(params[0], params[1], params[2], "optimizer")
            for key, value in others[0].state[params[1]].items():
                if isinstance(value, Tensor):
                    exact = others[1].state[params[2]][key]
                    assert_agrees(ours.state[params[0]][key], value, exact, "optimizer")

    rows = pairs(**OPTIMIZERS[name], dtype=DTYPES)
    tally("optimizers", run_cases(rows, -(-CASES // len(OPTIMIZERS)), check))


LSTMS = {
    "num_layers": (1, 2, 3), "bias": FLAG, "batch_first": FLAG, "bidirectional": FLAG,
    "projected": FLAG, "initial": FLAG, "form": ("batch", "packed", "unbatched"),
    "layout": ("contiguous", "transposed", "strided", "expanded"), "training": FLAG,
    "dtype": (torch.float32, torch.float64),
}  # fmt: skip


def test_lstm(tally: Tally) -> None:
    def check(draw: Any, row: dict[str, Any]) -> None:
        inputs, hidden = draw.of(st.integers(1, 9)), draw.of(st.integers(2, 24))
        steps, batch = draw.of(st.integers(1, 7)), draw.of(st.integers(1, 5))
        lengths = [draw.of(st.integers(1, steps)) for _ in range(batch)]
        portion = draw.of(portions) // 3  # one odd number spoils its whole sequence
        options = {k: row[k] for k in ("num_layers", "bias", "batch_first", "bidirectional")}
        options["proj_size"] = hidden // 2 if row["projected"] else 0
        dtype, form, random = row["dtype"], row["form"], draw.generator
        torch.manual_seed(draw.of(st.integers(0, 99)))
        stock = torch.nn.LSTM(inputs, hidden, **options, dtype=dtype)
        ours = nn.LSTM(inputs, hidden, **options, dtype=dtype, backend="cpu")
        ours.load_state_dict(stock.state_dict())
        exact = torch.nn.LSTM(inputs, hidden, **options, dtype=torch.float64)
        exact.load_state_dict(stock.state_dict())
        shape = (batch, steps, inputs) if row["batch_first"] else (steps, batch, inputs)
        shape = (steps, inputs) if form == "unbatched" else shape
        data = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        data = laid_out(with_odd(data, portion, random), row["layout"])
        states: list[Tensor] = []
        if row["initial"]:
            blocks = options["num_layers"] * (1 + options["bidirectional"])
            middle = () if form == "unbatched" else (batch,)
            for size in (options["proj_size"] or hidden, hidden):
                made = torch.randn(blocks, *middle, size, generator=random).to(dtype)
                states.append(with_odd(made, portion, random))
        results = []
        for lstm in (ours, stock, exact):
            lstm.train(row["training"])
            wide = lstm.weight_hh_l0.dtype
            leaves = [t.to(wide).detach().requires_grad_() for t in (data, *states)]
            given: Any = leaves[0]
            if form == "packed":
                given = pack_padded_sequence(
                    given, torch.tensor(lengths), row["batch_first"], enforce_sorted=False
                )
            output, final = lstm(given, tuple(leaves[1:]) or None)
            output = output.data if isinstance(output, PackedSequence) else output
            weights = torch.arange(output.numel(), dtype=wide).remainder(5).view(output.shape) - 2
            loss = (output * weights).sum() + final[0].sum() - final[1].sum() / 2
            gradients = torch.autograd.grad(loss, [*leaves, *lstm.parameters()])
            results.append(([output, *final], gradients))
        for triple in zip(*(outputs for outputs, _ in results), strict=True):
            assert_agrees(*triple, "lstm")
        for triple in zip(*(gradients for _, gradients in results), strict=True):
            if portion:
                assert_finite_alike(*triple)
            else:
                assert_agrees(*triple, "lstm gradients")

    tally("LSTM", run_cases(pairs(**LSTMS), CASES, check))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers, or where expanded those of the first row, in other strides."""
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        return torch.stack([values, values], -1).flatten(-2)[..., ::2]
    return values[:1].expand(values.shape) if layout == "expanded" else values


ATTENTIONS = {
    "mask": (None, "allowed", "allowed for all", "bias", "bias of keys", "bias of queries"),
    "is_causal": FLAG, "scale": (None, 0.25, -0.5), "enable_gqa": FLAG, "dims": (3, 4),
    "layout": ("contiguous", "transposed", "strided"), "gradients": FLAG, "dtype": DTYPES[:2],
}  # fmt: skip


def test_attention(tally: Tally) -> None:
    def check(draw: Any, row: dict[str, Any]) -> None:
        random, dtype = draw.generator, row["dtype"]
        batch, key_heads = draw.of(st.integers(1, 3)), draw.of(st.integers(1, 3))
        heads = key_heads * (draw.of(st.integers(1, 3)) if row["enable_gqa"] else 1)
        queries, keys = draw.of(st.integers(1, 40)), draw.of(st.integers(1, 70))
        features, width = draw.of(st.integers(1, 40)), draw.of(st.integers(1, 40))
        portion = draw.of(portions) // 10
        first = (batch,) if row["dims"] == 4 else ()
        shapes = ((heads, queries, features), (key_heads, keys, features), (key_heads, keys, width))
        given = [
            laid_out(
                with_odd(
                    torch.randn(*first, *shape, generator=random).to(dtype),
                    portion,
                    random,
                    ODD_FACTORS,
                ),
                row["layout"],
            )
            for shape in shapes
        ]
        mask = masked(row["mask"], first, heads, queries, keys, random)
        is_causal = row["is_causal"] and mask is None
        options = {"is_causal": is_causal, "scale": row["scale"], "enable_gqa": row["enable_gqa"]}
        results = []
        for function, wide in (
            (scaled_dot_product_attention, dtype), (stock_attention, dtype),
            (stock_attention, torch.float64),
        ):  # fmt: skip
            leaves = [t.to(wide).detach().requires_grad_(row["gradients"]) for t in given]
            bias = mask if mask is None or mask.dtype is torch.bool else mask.to(wide)
            output = function(*leaves, attn_mask=bias, **options)
            gradients: tuple[Tensor, ...] = ()
            if row["gradients"]:
                weights = torch.arange(output.numel(), dtype=wide).remainder(5).view(output.shape)
                gradients = torch.autograd.grad((output * (weights - 2)).sum(), leaves)
            results.append(([output], gradients))
        for kind, op in enumerate(("attention", "attention gradients")):
            for triple in zip(*(result[kind] for result in results), strict=True):
                assert_agrees(*triple, op)

    tally("attention", run_cases(pairs(**ATTENTIONS), CASES, check))


def masked(
    kind: str | None,
    first: tuple[int, ...],
    heads: int,
    queries: int,
    keys: int,
    random: torch.Generator,
) -> Tensor | None:
    """A mask of the kind; each query sees a key, or stock's NaN would be all that is compared."""
    if kind is None:
        return None
    full = (*first, heads, queries, keys)
    shape = {
        "allowed": full, "bias": full, "allowed for all": (queries, keys),
        "bias of keys": (*full[:-2], 1, keys), "bias of queries": (queries, 1),
    }[kind]  # fmt: skip
    if kind.startswith("bias"):
        return torch.randn(shape, generator=random)
    seen = torch.rand(shape, generator=random) > 0.4
    seen[..., 0] = True
    return seen


@pytest.mark.parametrize("options", [*OPTIMIZERS.values(), LSTMS, ATTENTIONS], ids=str)
def test_each_pair_of_options_is_there(options: dict[str, Any]) -> None:
    there = set(each_pair(pairs(**options)))
    for (left, ours), (right, theirs) in itertools.combinations(options.items(), 2):
        for pair in itertools.product(map(repr, ours), map(repr, theirs)):
            assert ((left, pair[0]), (right, pair[1])) in there

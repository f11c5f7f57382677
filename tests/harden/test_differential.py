"""Ours beside stock on random calls: each pair of options, any shape and stride, odd values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock_attention
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from differential import (
    CASES,
    ODD,
    ODD_FACTORS,
    Kept,
    assert_agrees,
    assert_finite_alike,
    each_pair,
    pairs,
    portions,
    run_cases,
    unit_off,
    with_odd,
)
from fastopt import nn, optim
from fastopt.nn.functional import scaled_dot_product_attention
from strategies import on_grid, sizes, strided

Tally = Callable[[str, int], None]
FLAG = (False, True)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = DTYPES[2:]
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
    "Muon": {"lr": RATES["lr"], "weight_decay": RATES["weight_decay"], "momentum": (0.0, 0.5, 0.9),
             "nesterov": FLAG, "ns_steps": (0, 1, 5), "eps": (1e-7, 1.0),
             "adjust_lr_fn": (None, "original", "match_rms_adamw")},
    "Lion": {**RATES, "betas": MOMENTS["betas"]},
    "LAMB": {**MOMENTS, "bias_correction": FLAG, "adam_w_mode": FLAG, "grad_averaging": FLAG,
             "use_nvlamb": FLAG},
}  # fmt: skip
# Torch has no such class: the formula in double precision takes the place of stock, without what
# makes single precision overflow or cancel, and without clipping, which rounds halves twice.
NOT_IN_TORCH = ("Lion", "LAMB")
# NAdam adds gradient and momentum before it divides: of two of the largest numbers that overflows.
ODD_GRADIENTS = {
    **dict.fromkeys(NOT_IN_TORCH, (math.nan, *ODD_FACTORS)),
    "NAdam": tuple(value for value in ODD if value != 3e38),
}
matrices = st.tuples(st.integers(1, 12), st.integers(1, 40))


def contenders(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours, and what it is held to."""
    ours = getattr(optim, name)
    if name in NOT_IN_TORCH:
        ours = partial(ours, max_grad_norm=None)
        return partial(ours, backend="cpu"), partial(ours, backend="reference")
    stock = getattr(torch.optim, name)
    if name == "Muon":
        return ours, stock
    return partial(ours, backend="cpu"), partial(stock, foreach=False)


def allowed(row: dict[str, Any]) -> dict[str, Any]:
    """Nesterov's momentum is one without dampening."""
    if row.get("nesterov") and "dampening" in row:
        return {**row, "momentum": row["momentum"] or 0.9, "dampening": 0.0}
    return dict(row)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, tally: Tally) -> None:
    make, make_other = contenders(name)
    op = "muon" if name == "Muon" else "optimizer"
    odd = ODD_GRADIENTS.get(name, ODD)

    def check(draw: Any, row: dict[str, Any]) -> None:
        options = allowed(row)
        dtype = options.pop("dtype")
        shape = draw.of(matrices if name == "Muon" else sizes)
        portion = draw.of(portions)
        values = with_odd(draw.of(strided(shape, dtype, True)), portion, draw.generator, odd)
        params = [torch.nn.Parameter(values), torch.nn.Parameter(values.detach().clone())]
        params.append(torch.nn.Parameter(values.detach().double()))
        ours = make([params[0]], **options)
        others = [make_other([param], **options) for param in params[1:]]
        for _ in range(2):
            grad = with_odd(draw.of(strided(shape, dtype, False)), portion, draw.generator, odd)
            for param in params:
                param.grad = (
                    grad
                    if param is params[0]
                    else grad.to(param.dtype).clone(memory_format=torch.contiguous_format)
                )
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
            assert_agrees(params[0], params[1], params[2], op)
            for key, value in others[0].state[params[1]].items():
                if isinstance(value, Tensor):
                    exact = others[1].state[params[2]][key]
                    assert_agrees(ours.state[params[0]][key], value, exact, op)

    rows = pairs(**OPTIMIZERS[name], dtype=DTYPES)
    tally("optimizers", run_cases(rows, -(-CASES // len(OPTIMIZERS)), check))


LSTMS = {
    "num_layers": (1, 2, 3), "bias": FLAG, "batch_first": FLAG, "bidirectional": FLAG,
    "projected": FLAG, "initial": FLAG, "form": ("batch", "packed", "unbatched"),
    "layout": ("contiguous", "transposed", "strided", "expanded"), "training": FLAG,
    "dtype": DTYPES,
}  # fmt: skip


KEPT_LSTMS = (
    # A closed forget gate, and a cell before it that overflowed on its way to zero.
    Kept(
        {"num_layers": 2, "bias": False, "batch_first": False, "bidirectional": False,
         "projected": False, "initial": True, "form": "batch", "layout": "expanded",
         "training": False, "dtype": torch.float32},
        163, (2, 21, 1, 4, 1, 1, 1, 1, 50, 0),
    ),
    # A weight that is a subnormal half.
    Kept(
        {"num_layers": 2, "bias": False, "batch_first": False, "bidirectional": False,
         "projected": True, "initial": True, "form": "packed", "layout": "strided",
         "training": False, "dtype": torch.float16},
        12116, (1, 12, 5, 2, 1, 1, 3, 69),
    ),
)  # fmt: skip


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

        def run(lstm: Any, tensors: Sequence[Tensor], off: bool = False) -> list[Tensor]:
            """Three outputs, then gradients with respect to all that is given and all weights.

            Where what is given is rounded off, so is the gradient at each step.
            """
            lstm.train(row["training"])
            wide = lstm.weight_hh_l0.dtype
            leaves = [t.to(wide).detach().requires_grad_() for t in tensors]
            given: Any = leaves[0]
            if form == "packed":
                given = pack_padded_sequence(
                    given, torch.tensor(lengths), row["batch_first"], enforce_sorted=False
                )
            output, final = lstm(given, tuple(leaves[1:]) or None)
            output = output.data if isinstance(output, PackedSequence) else output
            weights = small_numbers(output.shape).to(wide)
            if off:
                weights = unit_off(weights.to(dtype), random)
            loss = (output * weights).sum() + final[0].sum() - final[1].sum() / 2
            return [output, *final, *torch.autograd.grad(loss, [*leaves, *lstm.parameters()])]

        results = [run(lstm, (data, *states)) for lstm in (ours, stock, exact)]
        terms: list[Tensor | None] = [None] * len(results[0])
        if dtype in NARROW:
            terms = [torch.zeros(()) for _ in terms]
            for _ in range(8):
                with torch.no_grad():
                    for moved, weight in zip(exact.parameters(), stock.parameters(), strict=True):
                        moved.copy_(unit_off(weight, random))
                rounded = run(exact, [unit_off(x, random) for x in (data, *states)], off=True)
                for place, (one, right) in enumerate(zip(rounded, results[2], strict=True)):
                    error = (one - right).nan_to_num().abs().max() / torch.finfo(dtype).eps
                    terms[place] = error.maximum(terms[place])
        for place, triple in enumerate(zip(*results, strict=True)):
            if place < 3:
                assert_agrees(*triple, "lstm", terms[place])
            elif portion:
                assert_finite_alike(*triple)
            else:
                assert_agrees(*triple, "lstm gradients", terms[place])

    for case in KEPT_LSTMS:
        case.run(check)
    tally("LSTM", run_cases(pairs(**LSTMS), CASES, check))


def small_numbers(shape: Sequence[int]) -> Tensor:
    """From -2 to 2."""
    return torch.arange(math.prod(shape)).remainder(5).view(*shape) - 2


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
    "layout": ("contiguous", "transposed", "strided"), "gradients": FLAG, "dtype": DTYPES,
}  # fmt: skip


KEPT_ATTENTIONS = (
    # Stock has NaN where what a causal mask hides is multiplied by a scale below 0.
    Kept(
        {"mask": None, "is_causal": True, "scale": -0.5, "enable_gqa": True, "dims": 4,
         "layout": "contiguous", "gradients": True, "dtype": torch.float64},
        0, (1, 1, 1, 1, 2, 1, 1, 0),
    ),
    # One key: what each query takes of it is 1, whatever its score, and no gradient is left.
    Kept(
        {"mask": "allowed for all", "is_causal": False, "scale": None, "enable_gqa": True,
         "dims": 3, "layout": "strided", "gradients": True, "dtype": torch.float32},
        577813, (1, 1, 2, 17, 1, 1, 20, 0),
    ),
)  # fmt: skip


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
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
        is_causal = row["is_causal"] and mask is None
        options = {"is_causal": is_causal, "scale": row["scale"], "enable_gqa": row["enable_gqa"]}
        results = []
        for function, wide in (
            (scaled_dot_product_attention, dtype), (stock_attention, dtype),
            (plain_attention, torch.float64),
        ):  # fmt: skip
            leaves = [t.to(wide).detach().requires_grad_(row["gradients"]) for t in given]
            bias = mask if mask is None or mask.dtype is torch.bool else mask.to(wide)
            output = function(*leaves, attn_mask=bias, **options)
            gradients: tuple[Tensor, ...] = ()
            weights = small_numbers(output.shape).to(wide)
            if row["gradients"]:
                gradients = torch.autograd.grad((output * weights).sum(), leaves)
            results.append((output, *gradients))
        terms = magnitudes(*(t.double() for t in (*given, weights)), bias, **options)
        for place, triple in enumerate(zip(*results, strict=True)):
            op = "attention gradients" if place else "attention"
            assert_agrees(*triple, op, terms[place])

    for case in KEPT_ATTENTIONS:
        case.run(check)
    tally("attention", run_cases(pairs(**ATTENTIONS), CASES, check))


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, enable_gqa: bool,
    **options: Any,
) -> Tensor:  # fmt: skip
    """What the documentation of torch says; its kernels have NaN for causal and a scale below 0."""
    if enable_gqa:
        key, value = repeated(query, key), repeated(query, value)
    return probabilities(query, key, attn_mask, **options) @ value


def repeated(query: Tensor, heads: Tensor) -> Tensor:
    """Heads of keys or values, one for each of the query's."""
    return heads.repeat_interleave(query.size(-3) // heads.size(-3), -3)


def probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """What each query takes of each key."""
    scores = query @ key.mT * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


def magnitudes(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, mask: Tensor | None, *,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Sums of the terms' magnitudes in the output and the gradients of query, key and value."""
    heads = key.size(-3)
    key, value = repeated(query, key), repeated(query, value)
    taken = probabilities(query, key, mask, is_causal, scale)
    of_taken = grad.abs() @ value.abs().mT
    of_scores = taken * (of_taken + (taken * of_taken).sum(-1, keepdim=True))
    of_scores = of_scores * abs(query.size(-1) ** -0.5 if scale is None else scale)

    def shared(of_heads: Tensor) -> Tensor:
        return of_heads.unflatten(-3, (heads, -1)).sum(-3)

    of_key, of_value = shared(of_scores.mT @ query.abs()), shared(taken.mT @ grad.abs())
    return taken @ value.abs(), of_scores @ key.abs(), of_key, of_value


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

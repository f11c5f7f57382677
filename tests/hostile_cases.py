"""Arguments that nobody should pass, as data: a new function to call is one ``Target``.

Run as a program it calls every target with every hostile value of every argument, each in a forked
child, and prints a line of JSON for each: what was raised, by stock on the same arguments as well,
and whether arguments had changed by then. A child that dies is an outcome too.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.optim.lr_scheduler import LambdaLR

import fastopt
from fastopt import nn, optim
from fastopt.nn import functional, utils

# Each makes a hostile value of one that works.
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "text": lambda good: "one",
    "None": lambda good: None,
    "nan": lambda good: math.nan,
    "negative": lambda good: -1,
    "list": lambda good: [good],
    "complex number": lambda good: 1j,
    "object": lambda good: object(),
    "two elements": lambda good: torch.ones(2),
}
# Instead of whole numbers that count something.
POWERS = {k: v for k, v in NUMBERS.items() if k != "negative"}
COUNTS = {name: NUMBERS[name] for name in ("text", "None", "negative", "list", "object")} | {
    "fraction": lambda good: 1.5,
}
GIVEN_COUNTS = {name: make for name, make in COUNTS.items() if name != "None"}
SIZES = COUNTS | {"beyond 64 bits": lambda good: 1 << 70}
PAIRS: dict[str, Callable[[Any], Any]] = {
    "one": lambda good: (0.9,),
    "three": lambda good: (0.9, 0.9, 0.9),
    "number": lambda good: 0.9,
    "above 1": lambda good: (1.5, 0.9),
    "second negative": lambda good: (0.9, -0.1),
    "nan": lambda good: (0.9, math.nan),
    "text": lambda good: ("a", "b"),
    "None": lambda good: None,
}
TENSORS: dict[str, Callable[[Any], Any]] = {
    "text": lambda good: "one",
    "None": lambda good: None,
    "number": lambda good: 1.0,
    "list": lambda good: good.tolist(),
    "whole numbers": lambda good: good.to(torch.int64),
    "complex": lambda good: good.to(torch.complex64),
    "another dtype": lambda good: good.to(torch.float64),
    "on meta": lambda good: good.to("meta"),
    "a dimension less": lambda good: good[0],
    "two dimensions more": lambda good: good[None, None],
    "other features": lambda good: torch.cat([good, good], -1),
    "sparse": lambda good: good.to_sparse(),
}
NAMES: dict[str, Callable[[Any], Any]] = {
    "unknown": lambda good: "nothing",
    "number": lambda good: 3,
    "list": lambda good: [good],
}
OBJECTS: dict[str, Callable[[Any], Any]] = {
    "text": lambda good: "one",
    "None": lambda good: None,
    "number": lambda good: 1.0,
    "a class": lambda good: type(good),
}
PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "text": lambda good: "one",
    "None": lambda good: None,
    "number": lambda good: 1.0,
    "empty": lambda good: [],
    "of numbers": lambda good: [1.0, 2.0],
    "of text": lambda good: ["one"],
    "in two groups": lambda good: [{"params": good}, {"params": good}],
    "no leaf": lambda good: [good[0] * 2],
    "a group without params": lambda good: [{"lr": 1.0}],
}
Hostile = dict[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Target:
    """Something to call.

    Attributes:
        name: Its public name.
        call: Ours, called with keywords.
        stock: Torch's twin, or None.
        arguments: Makes arguments that work.
        hostile: What to put in the place of each.
        words: What torch calls an argument in its texts, where it is not the name.
    """

    name: str
    call: Callable[..., Any]
    stock: Callable[..., Any] | None
    arguments: Callable[[], dict[str, Any]]
    hostile: dict[str, Hostile]
    words: dict[str, str] = field(default_factory=dict)


class NoTwinError(Exception):
    """Torch has no such argument."""


class Case(NamedTuple):
    """One argument of a target with one hostile value."""

    target: Target
    argument: str
    value: str

    @property
    def name(self) -> str:
        """For pytest."""
        return f"{self.target.name}-{self.argument}-{self.value}"


WORDS = {
    "lr": "learning rate|lr",
    "betas": "betas?",
    "eps": "epsilon|eps",
    "alpha": "alpha",
    "ema_decay": "decay",
    "weight_decay": "weight_decay|weight decay",
    "params": "param|optimizer got an empty|optimize",
    "nesterov": "nesterov",
}


def _params() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(4, 3, generator=generator)) for _ in "ab"]
    for param in params:
        param.grad = torch.randn(4, 3, generator=generator)
    return params


def _stepped(cls: Any) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        optimizer = cls(**arguments)
        if isinstance(optimizer, optim.ScheduleFreeAdamW):
            optimizer.train()
        optimizer.step()
        return optimizer

    return call


class _OfAnyOptimizer(torch.optim.Optimizer):
    """What torch says of the parameters of an optimizer that it has not got."""

    def __init__(self, params: Any, **unknown: Any) -> None:
        if unknown:
            raise NoTwinError
        super().__init__(params, {"lr": 0.1})


def _of_optimizer(name: str, **hostile: Hostile) -> Target:
    return Target(
        f"optim.{name}",
        _stepped(getattr(optim, name)),
        _stepped(getattr(torch.optim, name, _OfAnyOptimizer)),
        lambda: {"params": _params()},
        {"params": PARAMETERS, "lr": NUMBERS, "weight_decay": NUMBERS, **hostile},
        WORDS,
    )


SURROUNDINGS = {
    "max_grad_norm": {k: v for k, v in NUMBERS.items() if k != "None"},
    "norm_type": NUMBERS | {"unknown": lambda good: "two"},
    "error_if_nonfinite": NUMBERS,
    "clip_value": {k: v for k, v in NUMBERS.items() if k != "None"},
    "zero_grad_after_step": NUMBERS,
    "ema_decay": {k: v for k, v in NUMBERS.items() if k != "None"},
    "state_storage": NAMES,
    "param_precision": NAMES,
    "min_8bit_size": SIZES,
    "rounding_seed": SIZES,
    "backend": NAMES,
    "no_such_option": OBJECTS,
}
del SURROUNDINGS["norm_type"]["negative"]  # an order like others
MOMENTS = {"betas": PAIRS, "eps": NUMBERS}
OPTIMIZERS = [
    _of_optimizer("SGD", momentum=NUMBERS, dampening=NUMBERS),
    _of_optimizer("Adam", **MOMENTS),
    _of_optimizer("AdamW", **MOMENTS, **SURROUNDINGS),
    _of_optimizer(
        "Adagrad", lr_decay=NUMBERS, initial_accumulator_value=NUMBERS, eps=NUMBERS
    ),
    _of_optimizer("RMSprop", alpha=NUMBERS, eps=NUMBERS, momentum=NUMBERS),
    _of_optimizer("Adamax", **MOMENTS),
    _of_optimizer("RAdam", **MOMENTS),
    _of_optimizer("NAdam", **MOMENTS, momentum_decay=NUMBERS),
    _of_optimizer("Lion", betas=PAIRS),
    _of_optimizer("LAMB", **MOMENTS),
    _of_optimizer(
        "Muon", momentum=NUMBERS, ns_steps=COUNTS, ns_coefficients=PAIRS, eps=NUMBERS,
        adjust_lr_fn=NAMES,
    ),
    _of_optimizer(
        "ScheduleFreeAdamW", **MOMENTS, warmup_steps=NUMBERS, r=POWERS,
        weight_lr_power=POWERS,
    ),
]  # fmt: skip


def _with_state(cls: Any) -> dict[str, Any]:
    optimizer = cls(_params(), lr=0.1)
    optimizer.step()
    return {"optimizer": optimizer}


def _saved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """A state dictionary of Adam's, changed."""

    def make(_: Any) -> Any:
        saved = copy.deepcopy(_with_state(torch.optim.Adam)["optimizer"].state_dict())
        changed = change(saved)
        return saved if changed is None else changed

    return make


CHECKPOINTS: Hostile = {
    "text": lambda good: "one",
    "None": lambda good: None,
    "list": lambda good: [],
    "empty": lambda good: {},
    "a model's": lambda good: torch.nn.Linear(3, 4).state_dict(),
    "no groups": _saved(lambda saved: {"state": saved["state"], "param_groups": []}),
    "no state": _saved(lambda saved: {"param_groups": saved["param_groups"]}),
    "a parameter less": _saved(lambda saved: saved["param_groups"][0]["params"].pop() and None),
}


def _schedule(make: Callable[..., Any], **more: Hostile) -> Target:
    def arguments() -> dict[str, Any]:
        usual = {"warmup_steps": 2, "total_steps": 9, "final_factor": 0.1, "decay_steps": 3}
        taken = {name: value for name, value in usual.items() if name in more}
        return {"optimizer": torch.optim.SGD(_params(), lr=0.1), **taken}

    def stock(optimizer: Any, **_: Any) -> Any:
        return LambdaLR(optimizer, lambda step: 1.0)

    hostile = {"optimizer": OBJECTS, **more}
    return Target(f"optim.{make.__name__}", make, stock, arguments, hostile)


def _fraction() -> Hostile:
    return {name: NUMBERS[name] for name in ("text", "None", "nan", "negative", "list")}


FACTORIES = [
    _schedule(
        optim.warmup_cosine, warmup_steps=COUNTS, total_steps=COUNTS, final_factor=_fraction()
    ),
    _schedule(
        optim.warmup_linear, warmup_steps=COUNTS, total_steps=COUNTS, final_factor=_fraction()
    ),
    _schedule(
        optim.warmup_stable_decay, warmup_steps=COUNTS, total_steps=COUNTS, decay_steps=COUNTS,
        final_factor=_fraction(),
    ),
    _schedule(optim.warmup_inverse_sqrt, warmup_steps=COUNTS),
    Target(
        "optim.lr_range_test", optim.lr_range_test, None,
        lambda: {"step": lambda: 1.0, "optimizer": torch.optim.SGD(_params(), lr=0.1)},
        {
            "step": {k: OBJECTS[k] for k in ("text", "None", "number")}, "optimizer": OBJECTS,
            "start_lr": NUMBERS, "end_lr": NUMBERS, "num_steps": COUNTS,
            "smoothing": NUMBERS, "diverged": NUMBERS,
        },
    ),
    Target(
        "optim.GradientRelease", optim.GradientRelease, None,
        lambda: {"optimizer": optim.SGD(_params(), lr=0.1)},
        {
            "optimizer": OBJECTS, "accumulation_steps": COUNTS,
            "max_grad_norm": {k: v for k, v in NUMBERS.items() if k != "None"},
        },
    ),
    Target(
        "optim.from_torch", optim.from_torch, None,
        lambda: {"optimizer": torch.optim.Adam(_params(), lr=0.1)},
        {"optimizer": OBJECTS, **SURROUNDINGS},
        WORDS | {"optimizer": "from_torch takes"},
    ),
    Target(
        "optim.to_torch", optim.to_torch, None,
        lambda: {"optimizer": optim.Adam(_params(), lr=0.1)}, {"optimizer": OBJECTS},
        {"optimizer": "no twin"},
    ),
    Target(
        "optim.Adam.load_state_dict",
        lambda optimizer, state_dict: optimizer.load_state_dict(state_dict),
        lambda optimizer, state_dict: torch.optim.Adam(_params()).load_state_dict(state_dict),
        lambda: {**_with_state(optim.Adam), "state_dict": None}, {"state_dict": CHECKPOINTS},
    ),
    Target(
        "optim.Adam.add_param_group",
        lambda optimizer, param_group: optimizer.add_param_group(param_group),
        lambda optimizer, param_group: torch.optim.Adam(_params()).add_param_group(param_group),
        lambda: {**_with_state(optim.Adam), "param_group": None},
        {
            "param_group": {
                "text": lambda good: "one",
                "None": lambda good: None,
                "no params": lambda good: {"lr": 0.1},
                "numbers": lambda good: {"params": [1.0]},
                "a set": lambda good: {"params": {1}},
                "unknown storage": lambda good: {"params": _params(), "state_storage": "4bit"},
                "unknown precision": lambda good: {"params": _params(), "param_precision": 1},
            }
        },
        {"param_group": "param|storage|precision"},
    ),
    Target(
        "optim.Adam.step", lambda optimizer, closure: optimizer.step(closure),
        lambda optimizer, closure: torch.optim.Adam(_params()).step(closure),
        lambda: {**_with_state(optim.Adam), "closure": None},
        {"closure": {"text": lambda good: "one", "number": lambda good: 1.0}},
    ),
]  # fmt: skip


def _gradient(param: Parameter, grad: Any) -> list[Parameter]:
    param.grad = grad
    return [param]


GRADIENT_LISTS: Hostile = {
    "number": lambda good: 1.0,
    "None": lambda good: None,
    "of text": lambda good: ["one"],
    "of None": lambda good: [None],
    "on meta": lambda good: _gradient(
        Parameter(torch.ones(2, device="meta")), torch.ones(2, device="meta")
    ),
}
CLIPPED = {
    "max_norm": {k: NUMBERS[k] for k in ("text", "None", "list", "complex number", "object",
                                         "two elements")},
    "norm_type": {k: NUMBERS[k] for k in ("text", "None", "list", "complex number", "object",
                                          "two elements")},
}  # fmt: skip


def _util(name: str, arguments: Callable[[], dict[str, Any]], **hostile: Hostile) -> Target:
    twins = getattr(utils, name), getattr(torch.nn.utils, name)
    return Target(f"nn.utils.{name}", *twins, arguments, hostile)


UTILS = [
    _util(
        "clip_grad_norm_", lambda: {"parameters": _params(), "max_norm": 1.0},
        parameters=GRADIENT_LISTS, **CLIPPED,
    ),
    _util("get_total_norm", lambda: {"tensors": _params()}, tensors=GRADIENT_LISTS,
          norm_type=CLIPPED["norm_type"]),
    _util(
        "clip_grads_with_norm_",
        lambda: {"parameters": _params(), "max_norm": 1.0, "total_norm": torch.ones(())},
        parameters=GRADIENT_LISTS, max_norm=CLIPPED["max_norm"],
        total_norm={k: NUMBERS[k] for k in ("text", "None", "list", "object")},
    ),
    _util(
        "clip_grad_value_", lambda: {"parameters": _params(), "clip_value": 1.0},
        parameters=GRADIENT_LISTS, clip_value=CLIPPED["max_norm"],
    ),
]  # fmt: skip


def _made_lstm(cls: Any) -> Callable[..., Any]:
    return lambda **arguments: cls(**arguments)(torch.ones(3, 2, 5))


def _ran_lstm(cls: Any) -> Callable[..., Any]:
    def call(input: Any, hidden: Any, cell: Any) -> Any:
        torch.manual_seed(0)
        return cls(5, 7)(input, (hidden, cell))

    return call


def _packed(sizes: list[int]) -> Callable[[Any], Any]:
    def make(good: Tensor) -> Any:
        data = torch.ones(sum(abs(n) for n in sizes), 5)
        return PackedSequence(data, torch.tensor(sizes, dtype=torch.int64))

    return make


def _attended() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 3, 4, 8, generator=generator) for name in ATTENDED}


ATTENDED = ("query", "key", "value")
SHAPES = {"query": TENSORS, "key": TENSORS}
SHAPES["value"] = {k: v for k, v in TENSORS.items() if k != "other features"}  # which it may have


def _like(usual: Tensor, *left_out: str, **more: Callable[[Any], Any]) -> Hostile:
    """Hostile tensors in the place of one that is not there otherwise."""
    made: Hostile = {
        name: (lambda _, make=make: make(usual))
        for name, make in TENSORS.items()
        if name not in ("None", *left_out)
    }
    return made | more


MASKS = _like(
    torch.ones(4, 4), "a dimension less", "two dimensions more",
    other_keys=lambda good: torch.ones(4, 5),
    five_dimensions=lambda good: torch.ones(1, 1, 1, 4, 4),
)  # fmt: skip


def _starts(*numbers: int, dtype: torch.dtype = torch.int32) -> Callable[[Any], Tensor]:
    return lambda good: torch.tensor(numbers, dtype=dtype)


STARTS: Hostile = {
    "text": lambda good: "one",
    "list": lambda good: [0, 4],
    "empty": _starts(),
    "one": _starts(0),
    "real": _starts(0, 4, dtype=torch.float32),
    "a matrix": lambda good: torch.zeros(2, 2, dtype=torch.int32),
    "falling": _starts(0, 4, 2),
    "negative": _starts(-1, 4),
    "behind the rows": _starts(0, 400),
    "beyond 32 bits": _starts(0, 1 << 40, dtype=torch.int64),
    "on meta": lambda good: torch.zeros(2, dtype=torch.int32, device="meta"),
}


def _rows() -> dict[str, Any]:
    rows = {name: torch.ones(4, 2, 8) for name in ATTENDED}
    return {**rows, "cu_seqlens_q": torch.tensor([0, 2, 4], dtype=torch.int32)}


def _classes() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(4, 6, generator=generator),
        "linear_weight": torch.randn(5, 6, generator=generator),
        "target": torch.tensor([0, 1, 2, 4]),
    }


LOSS_NUMBERS = {
    "reduction": NAMES,
    "label_smoothing": _fraction(),
    "softcap": _fraction(),
    "z_loss": {k: NUMBERS[k] for k in ("text", "None", "nan", "list", "object")},
    "backend": NAMES,
}
TARGETS: Hostile = {
    "text": lambda good: "one",
    "None": lambda good: None,
    "list": lambda good: [0, 1, 2, 4],
    "no class": lambda good: torch.tensor([0, 1, 2, 5]),
    "negative": lambda good: torch.tensor([0, 1, 2, -1]),
    "real": lambda good: good.float(),
    "one more": lambda good: torch.zeros(5, dtype=torch.int64),
    "on meta": lambda good: good.to("meta"),
    "complex": lambda good: good.to(torch.complex64),
}


def _stock_loss(**arguments: Any) -> Any:
    for ours in ("softcap", "z_loss", "backend"):
        if ours in arguments:
            raise NoTwinError
    return torch.nn.functional.linear_cross_entropy(**arguments)


def _module(make: Callable[[], Any], run: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        torch.manual_seed(0)
        return run(make(), **arguments)

    return call


def _twin_modules(name: str, *sizes: int, **arguments: Any) -> Iterator[Target]:
    """Constructor and call of an attention module."""
    cls, stock = getattr(nn, name), getattr(torch.nn, name)
    first, second = {
        "MultiheadAttention": ("embed_dim", "num_heads"),
    }.get(name, ("d_model", "nhead"))
    counts = {k: COUNTS[k] for k in ("text", "None", "negative", "list", "fraction")}
    yield Target(
        f"nn.{name}", cls, stock, lambda: {first: 8, second: 2},
        {first: counts, second: counts | {"no divisor": lambda good: 3}},
    )  # fmt: skip
    called = {"MultiheadAttention": ATTENDED, "TransformerEncoderLayer": ("src",)}.get(
        name, ("tgt", "memory")
    )
    yield Target(
        f"nn.{name}.forward",
        *(_module(lambda c=c: c(*sizes), lambda module, **kw: module(**kw)) for c in (cls, stock)),
        lambda: {argument: torch.ones(3, 2, 8) for argument in called},
        {argument: TENSORS for argument in called},
    )


def _model() -> torch.nn.Module:
    return torch.nn.ModuleDict({"lstm": torch.nn.LSTM(3, 4)})


def _used(name: Any) -> None:
    with fastopt.use_backend(name):
        pass


MODULES = [
    Target(
        "nn.LSTM", _made_lstm(nn.LSTM), _made_lstm(torch.nn.LSTM),
        lambda: {"input_size": 5, "hidden_size": 7},
        {
            "input_size": SIZES, "hidden_size": SIZES, "num_layers": COUNTS,
            "dropout": NUMBERS, "proj_size": SIZES,
            "device": NAMES, "dtype": NAMES,
        },
    ),
    Target(
        "nn.LSTM, ours", _made_lstm(nn.LSTM), None, lambda: {"input_size": 5, "hidden_size": 7},
        {"weight_dropout": NUMBERS, "backend": NAMES},
    ),
    Target(
        "nn.LSTM.forward", _ran_lstm(nn.LSTM), _ran_lstm(torch.nn.LSTM),
        lambda: {
            "input": torch.ones(3, 2, 5), "hidden": torch.ones(1, 2, 7),
            "cell": torch.ones(1, 2, 7),
        },
        {
            "input": TENSORS | {
                "growing packed sizes": _packed([1, 2]), "no steps packed": _packed([]),
                "negative packed size": _packed([2, -1]), "more sequences packed": _packed([3, 1]),
                "more rows packed": lambda good: PackedSequence(
                    torch.ones(2, 5), torch.tensor([2, 2, 2])
                ),
            },
            "hidden": TENSORS, "cell": TENSORS,
        },
        {"input": "input|batch_sizes"},
    ),
    *_twin_modules("MultiheadAttention", 8, 2),
    *_twin_modules("TransformerEncoderLayer", 8, 2),
    *_twin_modules("TransformerDecoderLayer", 8, 2),
    Target(
        "nn.functional.scaled_dot_product_attention", functional.scaled_dot_product_attention,
        torch.nn.functional.scaled_dot_product_attention,
        _attended,
        {
            **SHAPES, "attn_mask": MASKS, "dropout_p": NUMBERS | {"above 1": lambda good: 1.5},
            "scale": {k: NUMBERS[k] for k in ("text", "list", "complex number", "object",
                                              "two elements")},
        },
    ),
    Target(
        "nn.functional.attention", functional.attention, None, _attended,
        {
            **SHAPES, "attn_mask": MASKS, "dropout_p": NUMBERS, "softcap": NUMBERS,
            "scale": {k: NUMBERS[k] for k in ("text", "nan", "list", "complex number", "object",
                                              "two elements")},
            "window_size": PAIRS, "alibi_slopes": _like(
                torch.ones(3), "whole numbers", "another dtype"
            ),
            "learnable_sink": _like(torch.ones(3), "another dtype"),
            "cache_seqlens": GIVEN_COUNTS, "backend": NAMES,
            "max_seqlen_q": {"alone": lambda good: 4},
            "cu_seqlens_k": {"alone": _starts(0, 4)},
        },
    ),
    Target(
        "nn.functional.attention, rows", functional.attention, None, _rows,
        {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": GIVEN_COUNTS,
         "max_seqlen_k": GIVEN_COUNTS},
    ),
    Target(
        "nn.functional.linear_cross_entropy", functional.linear_cross_entropy, _stock_loss,
        _classes,
        {
            "input": TENSORS, "linear_weight": TENSORS, "target": TARGETS,
            "linear_bias": _like(torch.ones(5)), "weight": _like(torch.ones(5)),
            "ignore_index": {k: COUNTS[k] for k in ("text", "list", "fraction")},
            "options": {k: OBJECTS[k] for k in ("text", "number")}, **LOSS_NUMBERS,
        },
    ),
    Target(
        "nn.LinearCrossEntropyLoss", nn.LinearCrossEntropyLoss, None,
        lambda: {"in_features": 6, "num_classes": 5},
        {"softcap": _fraction(), "z_loss": LOSS_NUMBERS["z_loss"], "backend": NAMES,
         "label_smoothing": {"negative": lambda good: -1.0, "above 1": lambda good: 2.0},
         "weight": {"another size": lambda good: torch.ones(3)}},
    ),
    Target(
        "convert", fastopt.convert, None, lambda: {"model": _model()},
        {
            "model": OBJECTS,
            "include": {"unknown": lambda good: ["encoder"], "number": lambda good: 3,
                        "of numbers": lambda good: [3], "a name": lambda good: "lstm"},
            "exclude": {"unknown": lambda good: ["encoder"], "number": lambda good: 3,
                        "None": lambda good: None, "a name": lambda good: "lstm"},
        },
        {"include": "include|no module named", "exclude": "exclude|no module named"},
    ),
    Target("revert", fastopt.revert, None, lambda: {"model": _model()}, {"model": OBJECTS}),
    Target(
        "explain", fastopt.explain, None, lambda: {"what": _model},
        {"what": {k: OBJECTS[k] for k in ("text", "None", "number")}},
    ),
    Target(
        "use_backend", lambda backend: _used(backend), None, lambda: {"backend": "cpu"},
        {"backend": NAMES | {"None": lambda good: None}},
    ),
]  # fmt: skip

ALL = [
    Case(target, argument, value)
    for target in [*OPTIMIZERS, *FACTORIES, *UTILS, *MODULES]
    for argument, values in target.hostile.items()
    for value in values
]


def fingerprint(what: Any) -> Any:
    """Everything that a call could change in its arguments, as text."""
    if isinstance(what, Tensor):
        if what.is_meta or what.is_sparse:
            return str(what)
        grad = what.grad if what.is_leaf else None
        held = what.detach().cpu().contiguous().view(-1)
        return [str(what.dtype), list(what.shape), held.tolist(), fingerprint(grad)]
    if isinstance(what, torch.optim.Optimizer):
        return [type(what).__name__, fingerprint(list(what.state.values())),
                fingerprint([dict(group) for group in what.param_groups])]  # fmt: skip
    if isinstance(what, torch.nn.Module):
        return [str(what), fingerprint(dict(what.named_parameters()))]
    if isinstance(what, dict):
        return {str(key): fingerprint(value) for key, value in what.items()}
    if isinstance(what, list | tuple):
        return [fingerprint(value) for value in what]
    return type(what).__name__


class Attempt(NamedTuple):
    """What a call raised, its text, and whether arguments had changed by then.

    ``raised`` is "" where the call returned, and None where there is nothing to call.
    """

    raised: str | None
    text: str = ""
    changed: bool = False


def attempt(case: Case, call: Callable[..., Any] | None) -> Attempt:
    """Calls with the hostile argument among those that work."""
    if call is None:
        return Attempt(None)
    arguments = case.target.arguments()
    make = case.target.hostile[case.argument][case.value]
    arguments[case.argument] = make(arguments.get(case.argument))
    before = str(fingerprint(arguments))
    try:
        call(**arguments)
    except NoTwinError:
        return Attempt(None)
    except Exception as error:
        changed = str(fingerprint(arguments)) != before
        return Attempt(type(error).__name__, str(error), changed)
    return Attempt("")


class Outcome(NamedTuple):
    """What came of a case; ``died`` names the signal, or is ""."""

    case: str
    ours: Attempt = Attempt(None)
    stock: Attempt = Attempt(None)
    died: str = ""


def outcome(case: Case) -> Outcome:
    """Ours and stock's."""
    stock = attempt(case, case.target.stock)
    if "unexpected keyword argument" in stock.text:
        stock = Attempt(None)
    return Outcome(case.name, attempt(case, case.target.call), stock)


def in_a_child(cases: list[Case]) -> Iterator[Outcome]:
    """The outcomes of cases up to the one that the child died of, or of all."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            with os.fdopen(write, "w") as pipe:
                for case in cases:
                    signal.alarm(30)
                    print(json.dumps(outcome(case)), file=pipe, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    told = 0
    with os.fdopen(read) as pipe:
        for line in pipe:
            told += 1
            yield read_outcome(line)
    _, status = os.waitpid(child, 0)
    if told < len(cases):
        died = signal.strsignal(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else "no Exception"
        yield Outcome(cases[told].name, died=died or str(status))


def read_outcome(line: str) -> Outcome:
    """Of the JSON that is printed."""
    name, ours, stock, died = json.loads(line)
    return Outcome(name, Attempt(*ours), Attempt(*stock), died)


def main() -> None:
    """A line for each case of the targets named, or of all."""
    torch.set_num_threads(1)  # torch's threads do not outlive a fork
    warnings.simplefilter("ignore")
    logging.getLogger("fastopt").setLevel(logging.ERROR)
    names = sys.argv[1:]
    cases = [case for case in ALL if not names or case.target.name in names]
    while cases:
        done = 0
        for found in in_a_child(cases):
            print(json.dumps(found), flush=True)
            done += 1
        cases = cases[done:]


if __name__ == "__main__":
    main()

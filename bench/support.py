"""The table of what each backend takes, which is what the backends answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from bench.gpu_operators import simulated_card
from fastopt.backends import registry
from fastopt.backends.contract import (
    AttentionRequest,
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
    Request,
)

DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Where the operator is one on complex numbers at all.
ALSO_COMPLEX = {"optimizer_step": {"complex": torch.complex64}}
BACKENDS = [name for name in registry.BACKENDS if name != "reference"]  # which takes everything

Ask = Callable[[torch.dtype], Request]


def _parameter(rule: str, slots: int, **options: Any) -> Ask:
    def request(dtype: torch.dtype) -> Request:
        param = torch.zeros(4, 6, dtype=dtype)
        if options.get("transposed"):
            param = param.t()
        grad = torch.zeros_like(param)
        if options.get("sparse"):
            grad = grad.to_sparse()
        state = tuple(torch.zeros_like(param) for _ in range(slots))
        group = {"differentiable": options.get("differentiable", False)}
        return ParameterRequest(param, grad, state, torch.zeros(()), rule, group)

    return request


def _lstm(projected: bool = False, packed: bool = False, directions: int = 1) -> Ask:
    def request(dtype: torch.dtype) -> Request:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        outputs = 4 if projected else 8
        weights = [zeros(32, 5), zeros(32, outputs), zeros(32), zeros(32)]
        weights += [zeros(outputs, 8)] if projected else []
        return LstmRequest(
            zeros(6, 5) if packed else zeros(2, 3, 5),
            torch.tensor([3, 3]) if packed else None,
            zeros(directions, 3, outputs),
            zeros(directions, 3, 8),
            weights * directions,
            has_biases=True,
            num_layers=1,
            bidirectional=directions == 2,
        )

    return request


def _attention(features: int = 64, key_heads: int = 4, **options: Any) -> Ask:
    def request(dtype: torch.dtype) -> Request:
        def zeros(heads: int) -> torch.Tensor:
            return torch.zeros(1, heads, 8, features, dtype=dtype)

        asked = dict(options)
        if asked.pop("bias", False):
            asked["bias"] = torch.zeros(1, 4, 8, 8, dtype=dtype, requires_grad=True)
        return AttentionRequest(zeros(4), zeros(key_heads), zeros(key_heads), **asked)

    return request


def _linear_cross_entropy(
    probabilities: bool = False, weighted: bool = False, **options: Any
) -> Ask:
    def request(dtype: torch.dtype) -> Request:
        target = torch.zeros(4, dtype=torch.int64)
        return LinearCrossEntropyRequest(
            torch.zeros(4, 8, dtype=dtype),
            torch.zeros((6, 3, 8) if options.get("dims") else (6, 8), dtype=dtype),
            torch.zeros(4, 6, dtype=dtype) if probabilities else target,
            weight=torch.zeros(6, dtype=dtype) if weighted else None,
            **{name: value for name, value in options.items() if name != "dims"},
        )

    return request


_STARTS = torch.tensor([0, 3, 8], dtype=torch.int32)

OPERATORS: dict[str, dict[str, Ask]] = {
    "optimizer_step": {
        "SGD": _parameter("sgd", 0),
        "momentum, classical momentum": _parameter("momentum", 1),
        "Nesterov": _parameter("nesterov", 1),
        "Adam, AdamW": _parameter("adam", 2),
        "amsgrad": _parameter("amsgrad", 3),
        "Lion": _parameter("lion", 1),
        "Adagrad": _parameter("adagrad", 1),
        "RMSprop": _parameter("rmsprop", 1),
        "RMSprop, centered, momentum": _parameter("rmsprop_centered_momentum", 3),
        "Adamax": _parameter("adamax", 2),
        "RAdam": _parameter("radam", 2),
        "NAdam": _parameter("nadam", 2),
        "schedule-free AdamW": _parameter("schedule_free_adamw", 2),
        "LAMB": _parameter("lamb", 2),
        "any strides": _parameter("adam", 2, transposed=True),
        "sparse gradients": _parameter("sgd", 0, sparse=True),
        "differentiable": _parameter("sgd", 0, differentiable=True),
    },
    "lstm": {
        "layers, dropout between them": _lstm(),
        "two directions": _lstm(directions=2),
        "projection": _lstm(projected=True),
        "packed sequences": _lstm(packed=True),
    },
    "attention": {
        "plain": _attention(),
        "causal": _attention(right=0),
        "causal from the bottom right, window": _attention(left=3, right=0, bottom_right=True),
        "boolean mask": _attention(allowed=torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        "learned bias": _attention(bias=True),
        "dropout": _attention(dropout=0.1, seed=torch.tensor(1)),
        "grouped heads": _attention(key_heads=2),
        "softcap": _attention(softcap=30.0),
        "ALiBi": _attention(slopes=torch.zeros(1, 4)),
        "sinks": _attention(sinks=torch.zeros(4)),
        "sequences behind each other": _attention(query_starts=_STARTS, key_starts=_STARTS),
        "cache": _attention(used_keys=torch.tensor([5], dtype=torch.int32)),
        "more than 256 features": _attention(features=320),
    },
    "linear_cross_entropy": {
        "classes as targets": _linear_cross_entropy(),
        "probabilities as targets": _linear_cross_entropy(probabilities=True),
        "class weights, label smoothing": _linear_cross_entropy(weighted=True, label_smoothing=0.1),
        "softcap, z-loss": _linear_cross_entropy(softcap=30.0, z_loss=1e-4),
        "losses by row": _linear_cross_entropy(reduction="none"),
        "K-dimensional": _linear_cross_entropy(dims=True),
    },
}


@contextmanager
def cards_on_the_host() -> Iterator[None]:
    """The backends of cards answer for tensors of the CPU, unasked for a self-check."""
    with mock.patch.dict(os.environ, {"FASTOPT_SELFCHECK": "off"}), simulated_card():
        yield


def _taken(operator: str, ask: Ask, backend: str) -> str:
    dtypes = {**DTYPES, **ALSO_COMPLEX.get(operator, {})}
    there = registry.BACKENDS[backend]
    return " ".join([name for name, dtype in dtypes.items() if ask(dtype).ask(there) is None])


def support_table() -> str:
    """Markdown: for each operator and option, the dtypes that each backend takes."""
    lines = []
    with cards_on_the_host():
        for operator, options in OPERATORS.items():
            lines += [f"| `{operator}` | {' | '.join(f'`{name}`' for name in BACKENDS)} |"]
            lines += ["|---" * (len(BACKENDS) + 1) + "|"]
            for option, ask in options.items():
                cells = [_taken(operator, ask, name) for name in BACKENDS]
                lines.append(f"| {option} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines).rstrip()

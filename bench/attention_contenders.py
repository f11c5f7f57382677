"""Everyone who takes part in an attention's case: ours, stock in all its forms, FlexAttention."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as stock

import fastopt
from bench.attention_cases import AttentionCase
from bench.compute_contenders import assert_same, compute_contender, with_gradients
from bench.timing import OURS, Contender

torch._dynamo.config.recompile_limit = 64  # each case is one more

# "The best of stock" is sought among these.
STOCK = ("torch default",)
PEERS = ("torch compiled", "FlexAttention")


@dataclass(frozen=True)
class Problem:
    """Inputs of a call and the gradient of its output, the same for every contender.

    ``bias`` is learned, or a mask of bools.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    cotangent: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        named = dict(zip(("query", "key", "value"), self.inputs, strict=True))
        is_learned = self.bias is not None and self.bias.is_floating_point()
        return {**named, "bias": self.bias} if is_learned else named  # type: ignore[dict-item]


def make_problem(case: AttentionCase, dtype: torch.dtype | None = None) -> Problem:
    """Draws in the case's dtype, so that a problem of another ``dtype`` has the same values."""
    generator = torch.Generator(case.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=case.device)
        return drawn.to(case.dtype).to(dtype or case.dtype)

    shapes = [
        (case.batch, case.heads, rows, case.features)
        for rows in (case.rows, case.length, case.length)
    ]
    query, key, value = (draw(*shape) for shape in shapes)
    bias = draw(case.heads, case.rows, case.length) if case.extra == "bias" else None
    if case.extra == "mask":
        bias = draw(case.rows, case.length) > 0
    problem = Problem((query, key, value), bias, draw(*shapes[0]))
    for leaf in problem.leaves.values():
        leaf.requires_grad_(case.mode == "training")
    return problem


def attention_contenders(case: AttentionCase) -> dict[str, Contender]:
    """A call for everyone."""
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: fastopt.nn.functional.scaled_dot_product_attention,
        "torch default": stock,
    }
    if case.compiled:
        functions["torch compiled"] = torch.compile(stock, dynamic=False)
        if case.mode == "inference" and case.extra != "dropout":  # all that it does on a CPU
            functions["FlexAttention"] = _flex_attention(case)
    return {
        name: _contender(case, make_problem(case), function) for name, function in functions.items()
    }


def gpu_attention_contenders(case: AttentionCase) -> dict[str, Contender]:
    """Ours, each of stock's kernels and FlexAttention; those that refuse the case drop out."""
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: fastopt.nn.functional.scaled_dot_product_attention,
        "torch default": stock,
        **{name: _stock_kernel(kernel) for name, kernel in STOCK_KERNELS.items()},
    }
    if case.compiled and case.extra != "dropout":
        functions["FlexAttention"] = _flex_attention(case)
    if case.dtype is not torch.float32 and case.extra in ("", "dropout"):
        functions |= _flash_attn()
    return {
        name: _contender(case, make_problem(case), function) for name, function in functions.items()
    }


STOCK_KERNELS = {
    "FLASH": SDPBackend.FLASH_ATTENTION,
    "EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def _stock_kernel(kernel: SDPBackend) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        with sdpa_kernel(kernel):
            return stock(*arguments)

    return call


def _flash_attn() -> dict[str, Callable[..., Tensor]]:
    """The package of this name, where it is installed."""
    try:
        package: Any = importlib.import_module("flash_attn")
    except ImportError:
        return {}

    def call(
        query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, dropout: float, causal: bool
    ) -> Tensor:
        rows_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        output: Tensor = package.flash_attn_func(*rows_first, dropout_p=dropout, causal=causal)
        return output.transpose(1, 2)

    return {"flash-attn": call}


@functools.cache
def _flex_attention(case: AttentionCase) -> Callable[..., Tensor]:
    """With the signature of ``scaled_dot_product_attention``; compiled once."""
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if case.causal:
        mask = create_block_mask(
            lambda batch, head, query, key: query >= key, None, None, case.rows, case.length,
            device=case.device,
        )  # fmt: skip
    if case.extra == "mask":
        allowed = make_problem(case).bias
        assert allowed is not None
        mask = create_block_mask(
            lambda batch, head, query, key: allowed[query, key], None, None, case.rows,
            case.length, device=case.device,
        )  # fmt: skip

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        def biased(score: Tensor, batch: Any, head: Any, row: Any, column: Any) -> Tensor:
            assert bias is not None
            return score + bias[head, row, column]

        score_mod = biased if case.extra == "bias" else None
        output = compiled(query, key, value, score_mod=score_mod, block_mask=mask)
        assert isinstance(output, Tensor)
        return output

    return call


def _output(case: AttentionCase, problem: Problem, function: Callable[..., Tensor]) -> Tensor:
    dropout = 0.1 if case.extra == "dropout" else 0.0
    return function(*problem.inputs, problem.bias, dropout, case.causal)


def _contender(case: AttentionCase, problem: Problem, function: Callable[..., Tensor]) -> Contender:
    call = partial(_output, case, problem, function)
    return compute_contender(case, problem.leaves, call, problem.cotangent)


# Against stock in double precision, relative and absolute; bf16 has 8 bits.
PARITY = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
TF32_PARITY = 8e-3


def clipped(case: AttentionCase) -> AttentionCase:
    """The case with fewer heads, queries and keys."""
    return dataclasses.replace(
        case, batch=min(case.batch, 2), heads=2, length=70, features=min(case.features, 32),
        compiled=False,
    )  # fmt: skip


def check_parity(case: AttentionCase) -> None:
    """Refuses to time a call that gives other numbers than stock in double precision.

    Dropout's draws are nobody else's: a case with dropout is compared without it.

    Raises:
        AssertionError: An output or, in training, a gradient differs.
    """
    small = clipped(case)
    if case.extra == "dropout":
        small = dataclasses.replace(small, extra="")
    ours = fastopt.nn.functional.scaled_dot_product_attention
    actual = _everything(small, make_problem(small), ours)
    expected = _everything(small, make_problem(small, torch.float64), stock)
    assert_same(case, actual, expected, TF32_PARITY if case.tf32 else PARITY[case.dtype])


def _everything(
    case: AttentionCase, problem: Problem, function: Callable[..., Tensor]
) -> dict[str, Any]:
    results = {"output": _output(case, problem, function)}
    return with_gradients(case, problem.leaves, results, problem.cotangent)

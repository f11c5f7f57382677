"""The parity cases that the attention's kernels have to pass on a card before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import registry
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.cuda_context import tf32_products
from fastopt.backends.reference import reference_attention
from fastopt.backends.selfcheck import Outcome, register

# Of the largest value: tf32 has 10 bits of mantissa, bf16 has 7.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
TF32_TOLERANCE = 3e-3

# Batch, heads, heads of keys, queries, keys, features, features of values: odd ones, several tiles,
# each size that a kernel is made for.
Sizes = tuple[int, int, int, int, int, int, int]
HALF, WHOLE = (1, 2, 1, 70, 150, 64, 40), (2, 2, 2, 33, 45, 128, 128)
LARGE: Sizes = (1, 1, 1, 20, 70, 200, 256)
WINDOW = {"left": 20, "right": 3, "bottom_right": True}
CAUSAL = {"right": 0, "bottom_right": True}
CASES: tuple[tuple[str, torch.dtype, Sizes, dict[str, Any]], ...] = (
    ("bf16", torch.bfloat16, HALF, {}),
    ("bf16, bias", torch.bfloat16, HALF, {"bias": (1, 2)}),
    ("bf16, dropout, 256 features", torch.bfloat16, LARGE, {"dropout": 0.2}),
    ("bf16, causal", torch.bfloat16, WHOLE, CAUSAL),
    ("bf16, 256 features", torch.bfloat16, LARGE, {}),
    ("fp16, window", torch.float16, HALF, WINDOW),
    ("fp16, mask", torch.float16, HALF, {"allowed": (1, 1)}),
    ("fp16, softcap, 256 features", torch.float16, LARGE, {"softcap": 2.0}),
    ("fp16, everything", torch.float16, WHOLE, {**CAUSAL, "bias": (1, 2), "softcap": 2.0,
                                                 "slopes": True, "dropout": 0.2, "sinks": True}),
    ("fp32", torch.float32, HALF, CAUSAL),
    ("fp32, 128 features", torch.float32, WHOLE, {}),
    ("fp32, 256 features", torch.float32, LARGE, CAUSAL),
    ("fp32, bias", torch.float32, WHOLE, {"bias": (1, 1)}),
    ("fp32, queries that see nothing", torch.float32, (1, 2, 2, 200, 3, 32, 32), CAUSAL),
    ("fp32, mask", torch.float32, LARGE, {"allowed": (1, 1)}),
    ("fp32, sequences", torch.float32, (1, 2, 1, 50, 90, 24, 24), {**CAUSAL, "sequences": True}),
    ("tf32", torch.float32, WHOLE, {"tf32": True}),
    ("tf32, 64 features", torch.float32, HALF, {"tf32": True, "softcap": 2.0}),
    ("tf32, 256 features", torch.float32, LARGE, {"tf32": True, "bias": (1, 1)}),
)  # fmt: skip


def check_attention(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Forward and backward against the reference in double precision."""
    for name, dtype, sizes, options in CASES:
        yield Outcome(name, _compare(dtype, sizes, dict(options), device, backend))


def _request(dtype: torch.dtype, sizes: Sizes, options: dict[str, Any]) -> AttentionRequest:
    """On the CPU, with numbers that the dtype has."""
    batch, heads, key_heads, queries, keys, features, value_features = sizes
    generator = torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors: dict[str, Any] = {}
    if bias := options.pop("bias", None):
        tensors["bias"] = values(*bias, queries, keys)
    if allowed := options.pop("allowed", None):
        tensors["allowed"] = values(*allowed, queries, keys) > 0
    if options.pop("slopes", False):
        tensors["slopes"] = torch.linspace(0.1, 0.5, batch * heads).view(batch, heads)
    if options.pop("sinks", False):
        tensors["sinks"] = torch.linspace(-1, 1, heads)
    if options.pop("sequences", False):
        tensors["query_starts"] = torch.tensor([0, 7, 7, queries], dtype=torch.int32)
        tensors["key_starts"] = torch.tensor([0, 20, 21, keys], dtype=torch.int32)
    if options.get("dropout"):
        tensors["seed"] = torch.tensor(5)
    return AttentionRequest(
        values(batch, heads, queries, features), values(batch, key_heads, keys, features),
        values(batch, key_heads, keys, value_features), scale=features**-0.5, **tensors, **options,
    )  # fmt: skip


def _moved(request: AttentionRequest, device: torch.device, dtype: torch.dtype) -> AttentionRequest:
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(request):
        tensor = getattr(request, field.name)
        if isinstance(tensor, Tensor) and field.name != "seed":
            is_wide = tensor.is_floating_point() and field.name != "slopes"
            changed[field.name] = tensor.to(device, dtype if is_wide else tensor.dtype)
    return dataclasses.replace(request, **changed)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _compare(
    dtype: torch.dtype, sizes: Sizes, options: dict[str, Any], device: torch.device, backend: str
) -> str:
    tf32 = options.pop("tf32", False)
    request = _request(dtype, sizes, options)
    leaves = ("query", "key", "value", "bias", "sinks")
    exact = _moved(request, torch.device("cpu"), torch.float64)
    wanted = [name for name in leaves if getattr(exact, name) is not None]
    inputs = [getattr(exact, name).requires_grad_() for name in wanted]
    output, logsumexp = reference_attention(exact)
    gradient = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(dtype)
    gradient = gradient.view(output.shape)
    expected = [output.detach(), logsumexp.detach()]
    expected += torch.autograd.grad(output, inputs, gradient.double())

    mine = _moved(request, device, dtype)
    kernels = registry.kernels(registry.choose(mine, backend).name)
    backward = mine.bias is not None, mine.sinks is not None
    with tf32_products(tf32):
        output, logsumexp = kernels.attention_forward(mine)
        saved = gradient.to(device), output, logsumexp
        found = kernels.attention_backward(mine, *saved, *backward)
        with _deterministic():  # kernels of its own
            query_gradient = kernels.attention_backward(mine, *saved, *backward)[0]
    gradients = [query_gradient, *[found[leaves.index(name)] for name in wanted]]
    expected.insert(2, expected[2])
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCES[dtype]
    names = ["output", "logsumexp", "deterministic gradient of query"]
    names += [f"gradient of {name}" for name in wanted]
    for name, actual, truth in zip(names, [output, logsumexp, *gradients], expected, strict=True):
        size = float(truth[truth.isfinite()].abs().max()) if truth.isfinite().any() else 1.0
        try:
            torch.testing.assert_close(
                actual.detach().cpu().double(), truth, rtol=tolerance,
                atol=tolerance * max(size, 1.0),
            )  # fmt: skip
        except AssertionError as error:
            return f"{name}: {' '.join(str(error).split())}"
    return ""


register("attention", check_attention)

"""The operator ``attention``: registration, autograd, and one call of a backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import cpu_attention, registry
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.plain_tensors import compute_dtype
from fastopt.backends.reference import reference_attention

LIBRARY = torch.library.Library("fastopt", "FRAGMENT")

# The fields of an AttentionRequest, in their order.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? allowed, Tensor? slopes, "
    "Tensor? seed, float dropout, float scale, float softcap, int left, int right, int diagonal"
)
LIBRARY.define(f"attention({_ARGUMENTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "attention_backward(Tensor output_gradient, Tensor output, Tensor logsumexp, bool bias_wanted, "
    f"{_ARGUMENTS}) -> Tensor[]"
)
torch.library.impl(LIBRARY, "attention", "CPU")(cpu_attention.forward)
torch.library.impl(LIBRARY, "attention_backward", "CPU")(cpu_attention.backward)

_TENSORS = 7  # the first arguments


@torch.library.register_fake("fastopt::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sums = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    return cpu_attention.empty_output(query, value), sums


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "fastopt::attention_backward", lib=LIBRARY
)
def _fake_backward(
    output_gradient: Tensor, output: Tensor, logsumexp: Tensor, bias_wanted: bool, *arguments: Any
) -> list[Tensor]:
    *inputs, bias = arguments[:4]
    gradients = [cpu_attention.empty_gradient(tensor) for tensor in inputs]
    return [*gradients, bias.new_empty(bias.shape)] if bias_wanted else gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.numbers = inputs[_TENSORS:]
    ctx.save_for_backward(*output, *inputs[:_TENSORS])


def _gradients(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    output, logsumexp, *tensors = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    nothing = [None] * (len(tensors) + len(ctx.numbers))
    if gradient is None or not any(wanted):
        return tuple(nothing)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = _differentiable_gradients(
            gradient, AttentionRequest(*tensors, *ctx.numbers), wanted
        )
    else:
        found = torch.ops.fastopt.attention_backward(
            gradient, output, logsumexp, wanted[3], *tensors, *ctx.numbers
        )
    return (*found, *nothing[len(found) :])


torch.library.register_autograd(
    "fastopt::attention", _gradients, setup_context=_setup_context, lib=LIBRARY
)


def _differentiable_gradients(
    gradient: Tensor, request: AttentionRequest, wanted: list[bool]
) -> list[Tensor | None]:
    """The same gradients by torch's operations, for derivatives of higher order."""
    tensors = [request.query, request.key, request.value, request.bias]
    with torch.enable_grad():
        output, _ = reference_attention(request)
        leaves = [t for t, want in zip(tensors, wanted, strict=True) if want and t is not None]
        found = iter(torch.autograd.grad(output, leaves, gradient, create_graph=True))
    return [next(found) if want else None for want in wanted]


def with_seed(request: AttentionRequest) -> AttentionRequest:
    """The request with a seed drawn from torch's generator of the CPU."""
    return dataclasses.replace(request, seed=torch.empty((), dtype=torch.int64).random_())


def attention(
    request: AttentionRequest, backend: str | None = None
) -> tuple[Tensor, Tensor] | None:
    """Runs an attention.

    Args:
        request: What to run. Without a seed, one is drawn from torch's generator of the CPU.
        backend: The backend that the caller names.

    Returns:
        Output and logsumexp; None where torch is to run it.

    Raises:
        RuntimeError: The backend that the user named does not take the tensors.
    """
    if torch.compiler.is_compiling():  # Dynamo reads neither context variables nor loggers
        chosen = registry.choose_silently(request, backend or "auto")
    else:
        chosen = registry.choose(request, registry.requested(backend)).name
    if chosen == "torch":
        return None
    if request.dropout > 0 and request.seed is None:
        request = with_seed(request)
    if chosen == "reference":
        return reference_attention(request)
    output, logsumexp = torch.ops.fastopt.attention(
        *[getattr(request, field.name) for field in dataclasses.fields(request)]
    )
    return output, logsumexp

"""The operator ``attention``: registration, autograd, and one call of a backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import cpu_attention, registry
from fastopt.backends.attention_requests import empty_gradient, empty_output
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.plain_tensors import compute_dtype
from fastopt.backends.reference import reference_attention

LIBRARY = torch.library.Library("fastopt", "FRAGMENT")

# The fields of an AttentionRequest, in their order, the first ones tensors; and who runs it.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? allowed, Tensor? slopes, "
    "Tensor? sinks, Tensor? query_starts, Tensor? key_starts, Tensor? used_keys, Tensor? seed, "
    "float dropout, float scale, float softcap, int left, int right, bool bottom_right, "
    "bool inference, str backend"
)
_NAMES = [field.name for field in dataclasses.fields(AttentionRequest)]
_TENSORS = _NAMES.index("dropout")
_DIFFERENTIABLE = tuple(map(_NAMES.index, ("query", "key", "value", "bias", "sinks")))

LIBRARY.define(f"attention({_ARGUMENTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "attention_backward(Tensor output_gradient, Tensor output, Tensor logsumexp, bool bias_wanted, "
    f"bool sinks_wanted, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *request, backend = arguments
    return registry.kernels(backend).attention_forward(AttentionRequest(*request))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    gradient, output, logsumexp, bias_wanted, sinks_wanted, *request, backend = arguments
    return registry.kernels(backend).attention_backward(
        AttentionRequest(*request), gradient, output, logsumexp, bias_wanted, sinks_wanted
    )


for _device in registry.DISPATCH_KEYS:
    torch.library.impl(LIBRARY, "attention", _device)(_forward)
    torch.library.impl(LIBRARY, "attention_backward", _device)(_backward)


@torch.library.register_fake("fastopt::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sums = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    return empty_output(query, value), sums


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "fastopt::attention_backward", lib=LIBRARY
)
def _fake_backward(
    output_gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    bias_wanted: bool,
    sinks_wanted: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    request = AttentionRequest(*arguments[:-1])
    inputs = request.query, request.key, request.value
    gradients = [empty_gradient(tensor) for tensor in inputs]
    for tensor, wanted in (request.bias, bias_wanted), (request.sinks, sinks_wanted):
        if wanted and tensor is not None:
            gradients.append(tensor.new_empty(tensor.shape))
        else:
            gradients.append(request.query.new_empty(0))
    return tuple(gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.numbers = inputs[_TENSORS:]
    ctx.save_for_backward(*output, *inputs[:_TENSORS])


def _gradients(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    output, logsumexp, *tensors = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE]
    results: list[Tensor | None] = [None] * (len(_NAMES) + 1)
    if gradient is None or not any(wanted):
        return tuple(results)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        request = AttentionRequest(*tensors, *ctx.numbers[:-1])
        places = [place for place, want in zip(_DIFFERENTIABLE, wanted, strict=True) if want]
        leaves = {_NAMES[place]: tensors[place] for place in places}
        found = _differentiable_gradients(gradient, request, leaves)
    else:
        places = list(_DIFFERENTIABLE)
        found = torch.ops.fastopt.attention_backward(
            gradient, output, logsumexp, *wanted[3:], *tensors, *ctx.numbers
        )
    for place, own in zip(places, found, strict=True):
        results[place] = own if ctx.needs_input_grad[place] else None
    return tuple(results)


torch.library.register_autograd(
    "fastopt::attention", _gradients, setup_context=_setup_context, lib=LIBRARY
)


def _differentiable_gradients(
    gradient: Tensor, request: AttentionRequest, leaves: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The same gradients by torch's operations, for derivatives of higher order."""
    with torch.enable_grad():
        # Aliases: one leaf may have been made from another, which is not this call's to follow.
        aliases = {name: tensor.view_as(tensor) for name, tensor in leaves.items()}
        output, _ = reference_attention(dataclasses.replace(request, **aliases))
        return torch.autograd.grad(
            output, list(aliases.values()), gradient, create_graph=True, materialize_grads=True
        )


def with_seed(request: AttentionRequest) -> AttentionRequest:
    """The request with a seed drawn from torch's generator of the CPU."""
    # Not random_(): Dynamo does not know it.
    seed = torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device="cpu")
    return dataclasses.replace(request, seed=seed)


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
        ValueError: No backend is called so.
        RuntimeError: The backend that the user named does not take the tensors.
    """
    if backend is not None:
        registry.check_name(backend)
    if torch.compiler.is_compiling():  # Dynamo reads neither context variables nor loggers
        chosen = registry.choose_silently(request, backend or "auto")
    else:
        chosen = registry.choose(request, registry.requested(backend)).name
    if chosen == "torch":
        return None
    if request.dropout > 0 and request.seed is None:
        request = with_seed(request)
    if chosen == "reference":
        if request.query_starts is not None or request.used_keys is not None:
            cpu_attention.check(request)
        return reference_attention(request)
    if not _wants_gradients(request):
        if _nobody_watches():
            return registry.kernels(chosen).attention_forward(request, inference=True)
        request = dataclasses.replace(request, inference=True)
    output, logsumexp = torch.ops.fastopt.attention(
        *[getattr(request, name) for name in _NAMES], chosen
    )
    return output, logsumexp


def _wants_gradients(request: AttentionRequest) -> bool:
    leaves = request.query, request.key, request.value, request.bias, request.sinks
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in leaves
    )


def _nobody_watches() -> bool:
    """No mode, profiler or tracer is to see the operator: a short call need not pay for it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )

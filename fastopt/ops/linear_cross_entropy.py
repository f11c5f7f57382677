"""The operator ``linear_cross_entropy``: registration, autograd, and one call of a backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from fastopt.backends import registry
from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.linear_cross_entropy_requests import empty_gradient
from fastopt.backends.plain_tensors import can_be_read_now, compute_dtype
from fastopt.backends.reference import reference_linear_cross_entropy

LIBRARY = torch.library.Library("fastopt", "FRAGMENT")

# The fields of a LinearCrossEntropyRequest, in their order, the first ones tensors; which gradients
# are wanted (no list: torch.jit.trace knows none of bools); who runs it.
_REQUEST = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
    "str reduction, int ignore_index, float label_smoothing, float softcap, float z_loss, "
    "int chunk_rows"
)
_WANTED = "bool input_wanted, bool weight_wanted, bool bias_wanted"
_NAMES = [field.name for field in dataclasses.fields(LinearCrossEntropyRequest)]
_TENSORS = _NAMES.index("reduction")
_DIFFERENTIABLE = tuple(map(_NAMES.index, ("input", "linear_weight", "linear_bias")))

# The loss, and gradients for a loss whose own is 1: empty where not wanted.
LIBRARY.define(
    f"linear_cross_entropy({_REQUEST}, {_WANTED}, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"linear_cross_entropy_backward(Tensor gradient, {_REQUEST}, {_WANTED}, str backend) -> "
    "(Tensor, Tensor, Tensor)"
)


def _split(arguments: tuple[Any, ...]) -> tuple[LinearCrossEntropyRequest, tuple[bool, ...], str]:
    count = len(_NAMES)
    return LinearCrossEntropyRequest(*arguments[:count]), arguments[count:-1], arguments[-1]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    request, wanted, backend = _split(arguments)
    return registry.kernels(backend).linear_cross_entropy_forward(request, wanted)


def _backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    request, wanted, backend = _split(arguments)
    kernels = registry.kernels(backend)
    return kernels.linear_cross_entropy_backward(request, gradient, wanted)


for _device in registry.DISPATCH_KEYS:
    torch.library.impl(LIBRARY, "linear_cross_entropy", _device)(_forward)
    torch.library.impl(LIBRARY, "linear_cross_entropy_backward", _device)(_backward)


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "fastopt::linear_cross_entropy", lib=LIBRARY
)
def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    request, _, _ = _split(arguments)
    shape = request.input.shape[:1] if request.reduction == "none" else ()
    loss = request.input.new_empty(shape, dtype=compute_dtype(request.input.dtype))
    return loss, *_fake_backward(loss, *arguments)


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "fastopt::linear_cross_entropy_backward", lib=LIBRARY
)
def _fake_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, wanted, _ = _split(arguments)
    leaves = [arguments[place] for place in _DIFFERENTIABLE]
    return tuple(
        empty_gradient(leaf, gradient, want) for leaf, want in zip(leaves, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.numbers = inputs[_TENSORS : len(_NAMES)]
    *ctx.formed, ctx.backend = inputs[len(_NAMES) :]
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])


def _gradients(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    wanted = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE]
    results: list[Tensor | None] = [None] * (len(_NAMES) + len(wanted) + 1)
    if gradient is None or not any(wanted):
        return tuple(results)
    saved = ctx.saved_tensors
    formed, tensors = saved[: len(wanted)], saved[len(wanted) :]
    found: Sequence[Tensor | None]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        request = LinearCrossEntropyRequest(*tensors, *ctx.numbers)
        found = _differentiable_gradients(gradient, request, wanted)
    elif all(have or not want for have, want in zip(ctx.formed, wanted, strict=True)):
        found = [
            _scaled(own, gradient) if want else None
            for own, want in zip(formed, wanted, strict=True)
        ]
    else:
        found = torch.ops.fastopt.linear_cross_entropy_backward(
            gradient, *tensors, *ctx.numbers, *wanted, ctx.backend
        )
    for place, own, want in zip(_DIFFERENTIABLE, found, wanted, strict=True):
        results[place] = own if want else None
    return tuple(results)


torch.library.register_autograd(
    "fastopt::linear_cross_entropy", _gradients, setup_context=_setup_context, lib=LIBRARY
)


def _scaled(own: Tensor, gradient: Tensor) -> Tensor:
    """A gradient that was formed for a loss whose own is 1: in place where nobody needs it again.

    It may then become the parameter's gradient as it is, without a second one in memory.
    """
    is_seen = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(gradient)
    )
    if is_seen or torch._C._autograd._get_current_graph_task_keep_graph():
        return own * gradient
    if can_be_read_now(gradient) and gradient.item() == 1:
        return own
    return own.mul_(gradient)


def _differentiable_gradients(
    gradient: Tensor, request: LinearCrossEntropyRequest, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by torch's operations, for derivatives of higher order."""
    with torch.enable_grad():
        # Aliases: one leaf may have been made from another, which is not this call's to follow.
        aliases = {
            _NAMES[place]: getattr(request, _NAMES[place]).view_as(getattr(request, _NAMES[place]))
            for place, want in zip(_DIFFERENTIABLE, wanted, strict=True)
            if want
        }
        loss = stock_linear_cross_entropy(dataclasses.replace(request, **aliases))
        found = iter(
            torch.autograd.grad(
                loss, list(aliases.values()), gradient.to(loss.dtype), create_graph=True,
                materialize_grads=True,
            )
        )  # fmt: skip
    return [next(found) if want else None for want in wanted]


def stock_linear_cross_entropy(request: LinearCrossEntropyRequest) -> Tensor:
    """Torch's own operations, one after the other."""
    weight, bias, target = request.linear_weight, request.linear_bias, request.target
    logits = torch_functional.linear(
        request.input,
        weight.flatten(0, -2),
        None if bias is None else bias.flatten(),
    )
    logits = logits.reshape(*request.input.shape[:-1], *weight.shape[:-1])
    if request.softcap:
        logits = request.softcap * torch.tanh(logits / request.softcap)
    loss = torch_functional.cross_entropy(
        logits, target, weight=request.weight, ignore_index=request.ignore_index,
        reduction=request.reduction, label_smoothing=request.label_smoothing,
    )  # fmt: skip
    if not request.z_loss:
        return loss
    squares = torch.logsumexp(logits, min(1, logits.dim() - 1)) ** 2
    counted = torch.ones_like(squares)
    if target.shape != logits.shape:
        counted = (target != request.ignore_index).to(squares)
    squares = request.z_loss * torch.where(counted != 0, squares, 0)
    if request.reduction == "mean":
        squares = squares.sum() / counted.sum()
    elif request.reduction == "sum":
        squares = squares.sum()
    return loss + squares


def linear_cross_entropy(
    request: LinearCrossEntropyRequest, backend: str | None = None
) -> Tensor | None:
    """Runs a linear layer with its cross-entropy.

    Args:
        request: What to run.
        backend: The backend that the caller names.

    Returns:
        The loss in the type of the arithmetic; None where torch is to run it.

    Raises:
        ValueError: No backend is called so.
        IndexError: A target on the CPU is no class.
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
    if chosen == "reference":
        return reference_linear_cross_entropy(request).to(compute_dtype(request.input.dtype))
    loss: Tensor = torch.ops.fastopt.linear_cross_entropy(
        *[getattr(request, name) for name in _NAMES], *_formed_now(request), chosen
    )[0]
    return loss


def _formed_now(request: LinearCrossEntropyRequest) -> list[bool]:
    """Whether the forward pass is to form the gradients of input, weight and bias.

    Not where each row's loss may get a gradient of its own; nor in half precision, where the mean's
    gradients are below all numbers that there are, unless a scaler's factor comes first.
    """
    waits = request.reduction == "none" or request.input.dtype is torch.float16
    leaves = request.input, request.linear_weight, request.linear_bias
    return [
        leaf is not None and leaf.requires_grad and torch.is_grad_enabled() and not waits
        for leaf in leaves
    ]

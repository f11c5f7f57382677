"""The operator ``grad_norm``: measures lists of gradients and clips them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastopt.backends import registry
from fastopt.backends.cpu import GradientList


def refuse_nonfinite(norm: float | Tensor, order: float) -> None:
    """Raises what torch raises.

    Raises:
        RuntimeError: ``norm`` is infinite or NaN.
    """
    if not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {order} for gradients from `parameters` is non-finite, so it "
            "cannot be clipped. To disable this error and scale the gradients by the non-finite "
            "norm anyway, set `error_if_nonfinite=False`"
        )


def clip_coefficient(max_norm: float, norm: float | Tensor) -> float | Tensor:
    """What brings gradients of a norm down to ``max_norm``, at most 1; NaN for a NaN."""
    coefficient = max_norm / (norm + 1e-6)
    if isinstance(coefficient, Tensor):
        return coefficient.clamp(max=1.0)
    return 1.0 if coefficient > 1 else coefficient


def gradient_list(
    tensors: list[Tensor], order: float = 2.0, *, of_parameters: bool = False
) -> GradientList | None:
    """Tensors, or the gradients of parameters, as the kernels see them.

    Returns:
        None where torch's own code is to run: asked for, or because the kernels refuse a tensor.

    Raises:
        RuntimeError: The user named a backend, and it does not take a tensor.
    """
    choice = registry.requested(None)
    if choice not in ("auto", "cpu") or torch.compiler.is_compiling():
        return None
    grads = GradientList(tensors, of_parameters)
    reason = grads.refusal(order)
    if reason is None:
        return grads
    if choice != "auto":
        raise RuntimeError(f"backend {choice!r} cannot measure gradients: {reason}")
    registry.log_fall_through(reason, "torch", "measure a list of gradients")
    return None


def clip_by_norm(grads: GradientList, max_norm: float, norm: Tensor) -> bool:
    """Scales gradients down to ``max_norm``. False: the kernels must not write them."""
    scale = clip_coefficient(max_norm, norm.item())
    return float(scale) == 1 or grads.clip(float(scale), math.inf)

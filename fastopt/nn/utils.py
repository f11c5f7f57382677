"""Clipping of gradients: the names and arguments of ``torch.nn.utils``, in one or two passes."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from fastopt.ops.grad_norm import clip_by_norm, gradient_list, refuse_nonfinite

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def get_total_norm(
    tensors: Iterable[Tensor] | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of tensors as if they were one vector; see :func:`torch.nn.utils.get_total_norm`.

    It is summed in double precision, so it neither overflows nor depends on the number of threads.

    Args:
        tensors: Any number of tensors of any shapes.
        norm_type: Order of the norm; ``inf``, ``-inf`` and 0 as in torch.
        error_if_nonfinite: Raise where the norm is infinite or NaN.
        foreach: Accepted; the kernels do not depend on it.

    Returns:
        A tensor of no dimensions, in the dtype of the tensors.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = float(norm_type)
    grads = gradient_list(tensors, norm_type)
    if grads is None:
        return torch.nn.utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    norm = grads.norm(norm_type)
    if error_if_nonfinite:
        refuse_nonfinite(norm, norm_type)
    return norm


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales gradients in place to a norm of at most ``max_norm``.

    As :func:`torch.nn.utils.clip_grad_norm_`, which multiplies by ``max_norm / (norm + 1e-6)``
    where that is below 1. Gradients within the bound are not written.

    Args:
        parameters: Those whose gradients are measured together and scaled.
        max_norm: The largest norm left.
        norm_type: Order of the norm; ``inf``, ``-inf`` and 0 as in torch.
        error_if_nonfinite: Raise where the norm is infinite or NaN, and scale nothing.
        foreach: Accepted; the kernels do not depend on it.

    Returns:
        The norm before, a tensor of no dimensions, in the dtype of the gradients.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
    max_norm, norm_type = float(max_norm), float(norm_type)
    grads = gradient_list(parameters, norm_type, of_parameters=True)
    if grads is None:
        return torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
    norm = grads.norm(norm_type)
    if error_if_nonfinite:
        refuse_nonfinite(norm, norm_type)
    if not clip_by_norm(grads, max_norm, norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def clip_grads_with_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scales gradients in place by ``max_norm / (total_norm + 1e-6)`` where that is below 1.

    As :func:`torch.nn.utils.clip_grads_with_norm_`.

    Args:
        parameters: Those whose gradients are scaled.
        max_norm: The largest norm left.
        total_norm: Their norm, from :func:`get_total_norm`.
        foreach: Accepted; the kernels do not depend on it.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = gradient_list(parameters, of_parameters=True)
    is_norm = isinstance(total_norm, Tensor) and total_norm.numel() == 1
    if grads is None or not is_norm or not clip_by_norm(grads, float(max_norm), total_norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)


def clip_grad_value_(
    parameters: Iterable[Tensor] | Tensor, clip_value: float, foreach: bool | None = None
) -> None:
    """Brings the elements of gradients into ``[-clip_value, clip_value]`` in place.

    As :func:`torch.nn.utils.clip_grad_value_`.

    Args:
        parameters: Those whose gradients are clipped.
        clip_value: The largest magnitude left.
        foreach: Accepted; the kernels do not depend on it.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = gradient_list(parameters, 1.0, of_parameters=True)  # complex ones are torch's to refuse
    if grads is None or not grads.clip(1.0, float(clip_value)):
        torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)

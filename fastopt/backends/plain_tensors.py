"""Which tensors kernels take: plain ones on their device, of any strides."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.contract import ParameterRequest

# By their numbers in core/dtypes.h.
REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*REAL_DTYPES, torch.complex64, torch.complex128)

# As DLPack numbers device types.
DLPACK_DEVICES = {"cpu": 1, "cuda": 2}

# Of tensors as the kernels see them, where a complex one has a dimension more.
MAX_DIMS = 64


def refuse_request(request: ParameterRequest, device: str) -> str | None:
    """Why kernels of a device type do not step a parameter, or None."""
    if request.group.get("differentiable"):
        return "differentiable=True has autograd record the step"
    reason = not_plain("the parameter", request.param, device)
    if reason is None and request.param.is_inference():
        reason = "the parameter was made in inference mode"
    if reason is None and _may_overlap_itself(request.param):
        reason = "elements of the parameter share memory"
    for slot in request.slots:
        if request.coding is not None:  # whatever it is, it is brought to its codes
            dtypes = (*REAL_DTYPES, torch.uint8)
            reason = reason or not_plain("a state tensor", slot, device, dtypes)
            continue
        reason = reason or not_plain("a state tensor", slot, device)
        if reason is None and _may_overlap_itself(slot):
            reason = "elements of a state tensor share memory"
        if reason is None:
            reason = unlike("a state tensor", slot, request.param)
    if reason is None and request.step is not None:
        reason = _not_a_counter("the step counter", request.step, device, REAL_DTYPES[:2])
    if reason is None and request.product is not None:
        reason = _not_a_counter("the product of momenta", request.product, device, REAL_DTYPES)
        if reason is None and is_on_host(request.product) and not is_on_host(request.step):
            reason = "steps are counted on the device and the product of momenta is not"
    if reason is None and request.grad is not None:
        reason = not_plain("the gradient", request.grad, device)
        reason = reason or unlike("the gradient", request.grad, request.param)
    return reason


def not_plain(
    what: str, tensor: Tensor, device: str, dtypes: Sequence[torch.dtype] = DTYPES
) -> str | None:
    """Why kernels of a device type, for these dtypes, cannot read a tensor, or None."""
    tensor_type = type(tensor)
    if tensor_type not in (Tensor, torch.nn.Parameter):
        return f"{what} is a {tensor_type.__name__}, a subclass of torch.Tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return f"{what} is inside a torch.func transform"
    if tensor.device.type != device:
        return f"{what} is on {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"{what} has layout {tensor.layout}"
    if tensor.dtype not in dtypes:
        return f"{what} has dtype {tensor.dtype}"
    if tensor.is_conj() or tensor.is_neg():
        return f"{what} is a lazily conjugated or negated view"
    if tensor._is_zerotensor() or (tensor.numel() and tensor.data_ptr() == 0):
        return f"{what} has no memory"
    if tensor.dim() + tensor.is_complex() > MAX_DIMS:
        return f"{what} has {tensor.dim()} dimensions"
    return None


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is spread over a mesh of devices."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody can have one without it
    return module is not None and type(tensor) is module.DTensor


def on_several_cards(tensors: Iterable[Tensor | None], device: torch.device) -> str | None:
    """Why kernels on one card cannot read all tensors, or None."""
    if device.type == "cpu":  # of which there is one
        return None
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return f"tensors are on {device} and {tensor.device}"
    return None


def is_on_host(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def can_be_read_now(tensor: Tensor) -> bool:
    """The same, of a tensor that has numbers already."""
    return is_on_host(tensor) and not torch.compiler.is_compiling()


def transformed() -> str | None:
    """Why no operator of ours runs now, whatever the tensors, or None."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation has no tangents of the kernels"
    # Not "is not None": Dynamo takes what it wraps for something.
    if isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter):
        return "a torch.func transform is active"
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to before kernels run, where it is on."""
    # Not asked of the usual ones: Dynamo of torch 2.11 does not trace the question.
    usual = device.type in ("cpu", "cuda")
    if not usual and not torch.amp.is_autocast_available(device.type):
        return None
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def unlike(what: str, tensor: Tensor, param: Tensor) -> str | None:
    """Why a tensor does not fit its parameter, or None."""
    if tensor.device != param.device:
        return f"{what} is on {tensor.device}, the parameter on {param.device}"
    if tensor.dtype != param.dtype:
        return f"{what} has dtype {tensor.dtype}, the parameter {param.dtype}"
    if tensor.shape != param.shape:
        return f"{what} has shape {tuple(tensor.shape)}, the parameter {tuple(param.shape)}"
    return None


def _may_overlap_itself(tensor: Tensor) -> bool:
    return _native_cpu.may_overlap_itself(list(tensor.shape), list(tensor.stride()))


def _not_a_counter(
    what: str, counter: Any, device: str, dtypes: Sequence[torch.dtype]
) -> str | None:
    if not isinstance(counter, Tensor):
        return f"{what} is the {type(counter).__name__} {counter!r}"
    if counter.dtype not in dtypes or counter.numel() != 1:
        return f"{what} has dtype {counter.dtype} and shape {tuple(counter.shape)}"
    on_host = not_plain(what, counter, "cpu") is None
    return None if on_host else not_plain(what, counter, device)

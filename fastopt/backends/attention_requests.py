"""What backends share of the attention: which requests fit, and what results look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.plain_tensors import (
    DLPACK_DEVICES,
    compute_dtype,
    is_on_host,
    not_plain,
    on_several_cards,
    transformed,
)


def refuse_attention(
    request: AttentionRequest, device: str, dtypes: Sequence[torch.dtype]
) -> str | None:
    """Why kernels of a device type, for these dtypes, do not run this attention, or None."""
    if reason := transformed():
        return reason
    if request.device.type != device:
        return f"the queries are on {request.device}"
    dtype = request.query.dtype
    if dtype not in dtypes:
        return f"no kernel has the dtype {dtype}"
    named = (
        ("query", request.query, dtype),
        ("key", request.key, dtype),
        ("value", request.value, dtype),
        ("attn_mask", request.bias, dtype),
        ("attn_mask", request.allowed, torch.bool),
        ("alibi_slopes", request.slopes, None),
        ("learnable_sink", request.sinks, None),
        ("cu_seqlens_q", request.query_starts, torch.int32),
        ("cu_seqlens_k", request.key_starts, torch.int32),
        ("cache_seqlens", request.used_keys, torch.int32),
    )
    if reason := on_several_cards([tensor for _, tensor, _ in named], request.device):
        return reason
    for name, tensor, wanted in named:
        if tensor is not None and wanted is not None and tensor.dtype is not wanted:
            return f"{name} has dtype {tensor.dtype} beside queries of {dtype}"
    if torch.compiler.is_compiling():
        return _refuse_sizes(request)
    if not _native_cpu.are_plain([t for _, t, _ in named], DLPACK_DEVICES[device]):
        for name, tensor, _ in named:
            if tensor is not None and (reason := not_plain(name, tensor, device, (tensor.dtype,))):
                return reason
    return _refuse_sizes(request)


def _refuse_sizes(request: AttentionRequest) -> str | None:
    """Sizes that do not fit are for torch to refuse, in its own words."""
    query, key, value = request.query, request.key, request.value
    if not query.dim() == key.dim() == value.dim() == 4:
        return "query, key and value are not all of 4 dimensions"
    if 0 in (query.size(1), key.size(1), query.size(-1), value.size(-1)):
        return "there are no heads or no features"
    sequences = request.query_starts is not None
    batch, heads, queries, features = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    if key.shape != (batch, key_heads, keys, features) or value.shape[:3] != key.shape[:3]:
        return "the sizes of query, key and value do not fit each other"
    if heads % key_heads:
        return f"{heads} heads of query are no multiple of {key_heads} of key"
    full = batch, heads, queries, keys
    for mask in (request.bias, request.allowed):
        if mask is not None and (
            mask.dim() != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True))
        ):
            return f"attn_mask of shape {tuple(mask.shape)} does not fit scores of shape {full}"
        if mask is not None and sequences:
            return "attn_mask does not go with cu_seqlens_q"
    if not 0 <= request.dropout < 1:
        return f"dropout_p is {request.dropout}"
    return None


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """``[batch, heads, queries, value_features]``, in the order in which queries lie in memory."""
    if query.is_contiguous():
        return query.new_empty((*query.shape[:3], value.size(-1)))
    strides = query.stride()
    order = [0, 1, 2]
    if strides[3] == 1 or query.size(3) == 1:
        order.sort(key=lambda dim: -strides[dim])
    sizes = [query.size(dim) for dim in order]
    return query.new_empty([*sizes, value.size(-1)]).permute(*map(order.index, range(3)), 3)


def contiguous_features(tensor: Tensor) -> Tensor:
    """As kernels read it: the features of a row beside each other."""
    if tensor.numel() == 0:
        return tensor.new_empty(tensor.shape)
    return tensor if tensor.size(-1) == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """``[batch, heads, queries, keys]`` with contiguous keys, the rest as strides of zero."""
    if mask is None:
        return None
    keys = key.size(2)
    if mask.size(-1) != keys or (keys > 1 and mask.stride(-1) != 1):
        mask = mask.expand(*mask.shape[:-1], keys).contiguous()
    return mask.expand(*query.shape[:3], keys)


def empty_gradient(tensor: Tensor) -> Tensor:
    """Laid out as the tensor, with contiguous features."""
    return torch.empty_like(contiguous_features(tensor))


def precise_dtype(request: AttentionRequest) -> torch.dtype:
    """Of logsumexp, and of sums on their way to gradients."""
    return compute_dtype(request.query.dtype)


def full_bias_sums(request: AttentionRequest) -> Tensor | None:
    """For the gradient of the bias, with all its rows and columns; or None."""
    if request.bias is None:
        return None
    shape = (*request.bias.shape[:2], request.query.size(2), request.key.size(2))
    return torch.empty(shape, dtype=precise_dtype(request), device=request.device)


class KernelArguments(NamedTuple):
    """A request as kernels take it: contiguous features, masks of full shape, numbers in place."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    allowed: Tensor | None  # uint8
    slopes: Tensor | None
    sinks: Tensor | None
    query_starts: Tensor | None
    key_starts: Tensor | None
    used_keys: Tensor | None
    scale: float
    softcap: float
    left: int
    right: int
    bottom_right: bool
    dropout: float
    seed: int


def kernel_arguments(request: AttentionRequest) -> KernelArguments:
    """The request in their order."""
    query, key = request.query, request.key
    allowed, slopes, seed = request.allowed, request.slopes, request.seed
    sinks = request.sinks
    starts, key_starts, used = (
        None if tensor is None else tensor.contiguous()
        for tensor in (request.query_starts, request.key_starts, request.used_keys)
    )
    return KernelArguments(
        contiguous_features(query), contiguous_features(key), contiguous_features(request.value),
        expanded(request.bias, query, key),
        expanded(None if allowed is None else allowed.view(torch.uint8), query, key),
        None if slopes is None else slopes.float().contiguous(),
        None if sinks is None else sinks.to(precise_dtype(request)).contiguous(),
        starts, key_starts, used, request.scale, request.softcap, request.left, request.right,
        request.bottom_right, request.dropout,
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip


def native_tensors(native: Any, request: AttentionRequest) -> Any:
    """The request as the functions of a native module take it."""
    return native.AttentionTensors(*kernel_arguments(request))


def _is_empty(request: AttentionRequest) -> bool:
    return 0 in (request.query.size(0), request.query.size(2), request.key.size(2))


def _has_unread_starts(request: AttentionRequest) -> bool:
    """Whether rows may belong to no sequence: what lies on a card is not read to find out."""
    return request.query_starts is not None and not is_on_host(request.query_starts)


def forward(
    request: AttentionRequest, run: Callable[[Tensor, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, which ``run`` writes."""
    query = request.query
    output = empty_output(query, request.value)
    logsumexp = query.new_empty(query.shape[:3], dtype=precise_dtype(request))
    if _is_empty(request) or _has_unread_starts(request):
        output.zero_()
        if request.sinks is None:
            logsumexp.fill_(-torch.inf)
        else:
            logsumexp.copy_(request.sinks.unsqueeze(1))
    if _is_empty(request):
        return output, logsumexp
    run(output, logsumexp)
    return output, logsumexp


def backward(
    request: AttentionRequest,
    output_gradient: Tensor,
    bias_sums: Tensor | None,
    sinks_wanted: bool,
    run: Callable[[Tensor, list[Tensor | None]], None],
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias and sinks.

    ``run`` gets the gradient of the output and what it is to write: the first three, the sums of
    the bias, which may have more rows than it, and those of the sinks in each sequence.
    """
    query, sinks = request.query, request.sinks if sinks_wanted else None
    gradients = [empty_gradient(tensor) for tensor in (query, request.key, request.value)]
    # Some of them nobody writes.
    if request.used_keys is not None or _is_empty(request) or _has_unread_starts(request):
        for gradient in gradients:
            gradient.zero_()
    sink_sums = None
    if sinks is not None:
        starts = request.query_starts
        batch = query.size(0) if starts is None else starts.size(0) - 1
        sink_sums = query.new_zeros((batch, query.size(1)), dtype=precise_dtype(request))
    if not _is_empty(request):
        bias = expanded(bias_sums, query, request.key)
        run(contiguous_features(output_gradient), [*gradients, bias, sink_sums])
    elif bias_sums is not None:
        bias_sums.zero_()
    if bias_sums is None or request.bias is None:
        gradients.append(query.new_empty(0))
    else:
        gradients.append(bias_sums.sum_to_size(request.bias.shape).to(request.bias.dtype))
    if sinks is None or sink_sums is None:
        gradients.append(query.new_empty(0))
    else:
        gradients.append(sink_sums.sum(0).to(sinks.dtype))
    return tuple(gradients)

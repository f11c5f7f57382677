"""The attention of backend ``cpu``: what it takes, and its forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.plain_tensors import REAL_DTYPES, compute_dtype, not_plain, transformed


def refuse_attention(request: AttentionRequest) -> str | None:
    """Why the kernels do not run this attention, or None."""
    if reason := transformed():
        return reason
    if request.device.type != "cpu":
        return f"the queries are on {request.device}"
    dtype = request.query.dtype
    if dtype not in REAL_DTYPES:
        return f"no kernel has the dtype {dtype}"
    named = {"key": request.key, "value": request.value, "attn_mask": request.bias}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype is not dtype:
            return f"{name} has dtype {tensor.dtype}, query {dtype}"
    if not torch.compiler.is_compiling():
        named |= {"query": request.query, "alibi_slopes": request.slopes}
        for name, tensor in named.items():
            if tensor is not None and (reason := not_plain(name, tensor, "cpu")):
                return reason
        allowed = request.allowed
        if allowed is not None and (
            reason := not_plain("attn_mask", allowed, "cpu", (torch.bool,))
        ):
            return reason
    return _refuse_sizes(request)


def _refuse_sizes(request: AttentionRequest) -> str | None:
    """Sizes that do not fit are for torch to refuse, in its own words."""
    query, key, value = request.query, request.key, request.value
    if not query.dim() == key.dim() == value.dim() == 4:
        return "query, key and value are not all of 4 dimensions"
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return "there is nothing to compute"
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
    if not 0 <= request.dropout < 1:
        return f"dropout_p is {request.dropout}"
    return None


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """``[batch, heads, queries, value_features]``, in memory heads lie beside each other."""
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.size(-1))).transpose(1, 2)


def _contiguous_features(tensor: Tensor) -> Tensor:
    return tensor if tensor.size(-1) == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    keys = key.size(2)
    if mask.size(-1) != keys or (keys > 1 and mask.stride(-1) != 1):
        mask = mask.expand(*mask.shape[:-1], keys).contiguous()
    return mask.expand(*query.shape[:3], keys)


def empty_gradient(tensor: Tensor) -> Tensor:
    """Laid out as the tensor, with contiguous features."""
    return torch.empty_like(_contiguous_features(tensor))


def _layer(request: AttentionRequest) -> _native_cpu.AttentionTensors:
    query, key = request.query, request.key
    allowed, slopes, seed = request.allowed, request.slopes, request.seed
    return _native_cpu.AttentionTensors(
        _contiguous_features(query), _contiguous_features(key), _contiguous_features(request.value),
        _expanded(request.bias, query, key),
        _expanded(None if allowed is None else allowed.view(torch.uint8), query, key),
        None if slopes is None else slopes.float().expand(query.shape[:2]).contiguous(),
        request.scale, request.softcap, request.left, request.right, request.diagonal,
        request.dropout, 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; see ``fastopt/ops/attention.py``."""
    request = AttentionRequest(*arguments)
    output = empty_output(request.query, request.value)
    logsumexp = torch.empty(request.query.shape[:3], dtype=compute_dtype(output.dtype))
    threads = torch.get_num_threads()
    _native_cpu.attention_forward(_layer(request), output, logsumexp, threads)
    return output, logsumexp


def backward(
    output_gradient: Tensor, output: Tensor, logsumexp: Tensor, bias_wanted: bool, *arguments: Any
) -> list[Tensor]:
    """Gradients of query, key and value, and of the bias where it is wanted."""
    request = AttentionRequest(*arguments)
    query, key, bias = request.query, request.key, request.bias
    gradients = [empty_gradient(tensor) for tensor in (query, key, request.value)]
    sums = None
    if bias_wanted and bias is not None:
        sums = torch.zeros((*bias.shape[:3], key.size(2)), dtype=compute_dtype(query.dtype))
    _native_cpu.attention_backward(
        _layer(request), output, logsumexp, _contiguous_features(output_gradient),
        [*gradients, _expanded(sums, query, key)], torch.get_num_threads(),
    )  # fmt: skip
    if sums is not None and bias is not None:
        gradients.append(sums.sum_to_size(bias.shape).to(bias.dtype))
    return gradients

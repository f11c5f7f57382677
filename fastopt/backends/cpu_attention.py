"""The attention of backend ``cpu``: what it takes, and its forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.plain_tensors import not_plain, transformed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refuse_attention(request: AttentionRequest) -> str | None:
    """Why the kernels do not run this attention, or None."""
    if reason := transformed():
        return reason
    if request.device.type != "cpu":
        return f"the queries are on {request.device}"
    dtype = request.query.dtype
    if dtype not in DTYPES:
        return f"no kernel has the dtype {dtype}"
    named = {
        "query": request.query,
        "key": request.key,
        "value": request.value,
        "attn_mask": request.bias,
        "the boolean attn_mask": request.allowed,
        "alibi_slopes": request.slopes,
    }
    for name, tensor in named.items():
        if tensor is None:
            continue
        if torch.compiler.is_compiling():
            continue
        if tensor is not request.allowed and (reason := not_plain(name, tensor, "cpu")):
            return reason
    for name in ("key", "value", "attn_mask"):
        tensor = named[name]
        if tensor is not None and tensor.dtype is not dtype:
            return f"{name} has dtype {tensor.dtype}, query {dtype}"
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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def cast_by_autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of them: it runs attention in its lower precision."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [
        t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t
        for t in tensors
    ]


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


def _layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    diagonal: int,
) -> _native_cpu.AttentionTensors:
    return _native_cpu.AttentionTensors(
        _contiguous_features(query), _contiguous_features(key), _contiguous_features(value),
        _expanded(bias, query, key),
        None if allowed is None else _expanded(allowed.view(torch.uint8), query, key),
        None if slopes is None else slopes.float().expand(query.shape[:2]).contiguous(),
        scale, softcap, left, right, diagonal, dropout,
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    diagonal: int,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; see ``fastopt/ops/attention.py``."""
    layer = _layer(
        query, key, value, bias, allowed, slopes, seed, dropout, scale, softcap, left, right,
        diagonal,
    )  # fmt: skip
    output = empty_output(query, value)
    logsumexp = torch.empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    _native_cpu.attention_forward(layer, output, logsumexp, torch.get_num_threads())
    return output, logsumexp


def backward(
    output_gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    bias_wanted: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    diagonal: int,
) -> Sequence[Tensor]:
    """Gradients of query, key and value, and of the bias where it is wanted."""
    layer = _layer(
        query, key, value, bias, allowed, slopes, seed, dropout, scale, softcap, left, right,
        diagonal,
    )  # fmt: skip
    gradients = [torch.empty_like(t) for t in map(_contiguous_features, (query, key, value))]
    sums = None
    if bias_wanted and bias is not None:
        shape = (*bias.shape[:3], key.size(2))
        sums = torch.zeros(shape, dtype=compute_dtype(query.dtype))
    expanded = None if sums is None else sums.expand(*query.shape[:3], key.size(2))
    _native_cpu.attention_backward(
        layer, output, logsumexp, _contiguous_features(output_gradient), [*gradients, expanded],
        torch.get_num_threads(),
    )  # fmt: skip
    if sums is not None and bias is not None:
        gradients.append(sums.sum_to_size(bias.shape).to(bias.dtype))
    return gradients

"""Attention as ``torch.nn.functional`` has it, and as flash-attn extends it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from fastopt.backends.contract import AttentionRequest
from fastopt.backends.plain_tensors import autocast_dtype
from fastopt.backends.reference import dropout_factors
from fastopt.ops.attention import attention as run_attention
from fastopt.ops.attention import with_seed


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The twin of ``torch.nn.functional.scaled_dot_product_attention``.

    Where the kernels do not take the tensors, torch runs, and raises what it raises. Dropout is
    drawn from torch's generator once per call; its pattern is not torch's.

    Args:
        query: ``[..., heads, queries, features]``.
        key: ``[..., key_heads, keys, features]``.
        value: ``[..., key_heads, keys, value_features]``.
        attn_mask: Broadcasts to ``[..., heads, queries, keys]``: bool, True where a key is seen, or
            of the query's dtype and added to the scores; its gradient is computed where wanted.
        dropout_p: Probability with which a weight is dropped.
        is_causal: Query ``i`` sees the keys up to ``i``.
        scale: Of the scores; ``1 / sqrt(features)`` by default.
        enable_gqa: ``heads`` may be a multiple of ``key_heads``.

    Returns:
        ``[..., heads, queries, value_features]``.

    Raises:
        RuntimeError: As torch.
    """
    request = None
    if _fits(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        request = _request(
            query, key, value, attn_mask, dropout_p, scale, 0.0, -1, 0 if is_causal else -1, 0, None
        )
    result = None if request is None else run_attention(request)
    if result is None:
        return torch_functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return result[0] if query.dim() == 4 else result[0].squeeze(0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with what flash-attn's users know, by its names, in torch's layout.

    Query ``i`` stands at key ``i + keys - queries``: masks are aligned at the bottom right. The
    scores are ``softcap(scale * query @ key^T) - slope * distance + attn_mask``. Heads of ``query``
    may be a multiple of those of ``key``. A query that sees no key gives zeros.

    Args:
        query: ``[batch, heads, queries, features]``.
        key: ``[batch, key_heads, keys, features]``.
        value: ``[batch, key_heads, keys, value_features]``.
        attn_mask: As for ``scaled_dot_product_attention``.
        dropout_p: Probability with which a weight is dropped.
        causal: No key after the query's own place.
        scale: Of the products; ``1 / sqrt(features)`` by default.
        window_size: How many keys before and after the query's own place are seen; -1: all.
        softcap: Products ``x`` become ``softcap * tanh(x / softcap)``; 0: they do not.
        alibi_slopes: fp32 ``[heads]`` or ``[batch, heads]`` (Press et al. 2022).
        return_lse: Return logsumexp of the scores too, which has no gradient.
        backend: ``auto``, ``cpu``, ``torch`` or ``reference``.

    Returns:
        ``[batch, heads, queries, value_features]``; with ``return_lse`` also
        ``[batch, heads, queries]``, -inf for a query that sees no key.

    Raises:
        ValueError: An argument is out of its range or has another shape.
        RuntimeError: No backend takes the tensors.
    """
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and not negative, got {softcap}")
    if alibi_slopes is not None and alibi_slopes.shape not in (
        query.shape[1:2],
        query.shape[:2],
    ):
        raise ValueError(
            f"alibi_slopes must be [heads] or [batch, heads], got {tuple(alibi_slopes.shape)}"
        )
    left, right = window_size
    if min(left, right) < -1:
        raise ValueError(f"window_size must be a pair of numbers from -1 on, got {window_size}")
    if causal:
        right = 0
    diagonal = key.size(2) - query.size(2)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(query.shape[:2])
    request = _request(
        query, key, value, attn_mask, dropout_p, scale, softcap, left, right, diagonal, slopes
    )
    result = run_attention(request, backend)
    if result is None:
        if return_lse:
            raise RuntimeError("backend 'torch' cannot return logsumexp")
        return torch_functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, causal, scale=scale, enable_gqa=True
        )
    return result if return_lse else result[0]


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention, and beside it the weights that it summed the values with, dropout included.

    Args:
        query: ``[batch, heads, queries, features]``.
        key: ``[batch, heads, keys, features]``.
        value: ``[batch, heads, keys, value_features]``.
        attn_mask: As for ``scaled_dot_product_attention``.
        dropout_p: As for ``scaled_dot_product_attention``.

    Returns:
        Output, and ``[batch, heads, queries, keys]``.
    """
    request = _request(query, key, value, attn_mask, dropout_p, None, 0.0, -1, -1, 0, None)
    if dropout_p > 0:
        request = with_seed(request)
    result = run_attention(request)
    scores = request.query @ request.key.transpose(-2, -1) * request.scale
    if request.bias is not None:
        scores = scores + request.bias
    if request.allowed is not None:
        scores = scores.masked_fill(~request.allowed, -torch.inf)
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(unseen, 0), -1).masked_fill(unseen, 0)
    if dropout_p > 0:
        weights = weights * dropout_factors(request).to(weights)
    return weights @ request.value if result is None else result[0], weights


def _fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Whether stock's rules allow the call, and the kernels know its form."""
    if not 3 <= query.dim() <= 4 or not query.dim() == key.dim() == value.dim():
        return False
    if (is_causal and mask is not None) or not 0 <= dropout < 1:
        return False
    return enable_gqa or query.size(-3) == key.size(-3)


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast makes of it: it runs attention in its lower precision."""
    dtype = autocast_dtype(tensor.device)
    if dtype is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(dtype)


def _request(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float,
    left: int,
    right: int,
    diagonal: int,
    slopes: Tensor | None,
) -> AttentionRequest:
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    if query.dim() == 3:  # heads without a batch
        query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
    bias = allowed = None
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        if mask.dtype is torch.bool:
            allowed = mask
        else:
            bias = _autocast(mask)
    features = query.size(-1)
    return AttentionRequest(
        query, key, value, bias, allowed, slopes, None, float(dropout),
        1 / math.sqrt(max(features, 1)) if scale is None else float(scale), float(softcap), left,
        right, diagonal,
    )  # fmt: skip

"""Attention as ``torch.nn.functional`` and flash-attn have it, and the linear cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from fastopt.backends.contract import AttentionRequest, TwinAttentionRequest
from fastopt.backends.plain_tensors import autocast_dtype, can_be_read_now
from fastopt.backends.reference import dropout_factors
from fastopt.nn.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fastopt.ops.arguments import is_scalar
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

    Where the kernels do not take the tensors, torch runs, and raises what it raises, and on cards
    that were measured to run its kernels faster. Dropout is drawn from torch's generator once per
    call; the kernels' pattern is not torch's. Jagged nested tensors run in the kernels too.

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
    result = None
    if not _are_meant(query, key, value, attn_mask, dropout_p, scale):
        pass  # torch says what is wrong
    elif query.is_nested or key.is_nested or value.is_nested:
        output = _nested(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if output is not None:
            return output
    elif _fits(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        request = _request(
            query, key, value, attn_mask, scale, TwinAttentionRequest,
            dropout=float(dropout_p), right=0 if is_causal else -1,
        )  # fmt: skip
        result = run_attention(request)
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
    learnable_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    cache_seqlens: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with what flash-attn's users know, by its names, in torch's layout.

    Query ``i`` stands at key ``i + keys - queries``: masks are aligned at the bottom right. The
    scores are ``softcap(scale * query @ key^T) - slope * distance + attn_mask``. Heads of ``query``
    may be a multiple of those of ``key``. A query that sees no key gives zeros.

    Args:
        query: ``[batch, heads, queries, features]``. With ``cu_seqlens_q``, sequences lie behind
            each other, as in flash-attn: ``[total_q, heads, features]``.
        key: ``[batch, key_heads, keys, features]`` or ``[total_k, key_heads, features]``.
        value: ``[batch, key_heads, keys, value_features]`` or
            ``[total_k, key_heads, value_features]``.
        attn_mask: As for ``scaled_dot_product_attention``; not with ``cu_seqlens_q``.
        dropout_p: Probability with which a weight is dropped.
        causal: No key after the query's own place.
        scale: Of the products; ``1 / sqrt(features)`` by default.
        window_size: How many keys before and after the query's own place are seen; -1: all.
        softcap: Products ``x`` become ``softcap * tanh(x / softcap)``; 0: they do not.
        alibi_slopes: fp32 ``[heads]`` or ``[batch, heads]`` (Press et al. 2022).
        learnable_sink: ``[heads]``: the score of one more key, which every query sees and whose
            value is zero (Xiao et al. 2024); its gradient is computed where wanted.
        cu_seqlens_q: int32 or int64 ``[batch + 1]``: where each sequence of queries begins, and the
            end of the last.
        cu_seqlens_k: The same for the keys; ``cu_seqlens_q`` by default.
        max_seqlen_q: The length of the longest sequence of queries, found out where not given.
        max_seqlen_k: The same for the keys.
        cache_seqlens: How many keys there are, of all sequences or ``[batch]``: a cache has room
            for more. Queries are the last ones: their own keys are counted.
        return_lse: Return logsumexp of the scores too, which has no gradient.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton``, ``torch`` or ``reference``.

    Returns:
        ``[batch, heads, queries, value_features]``, or ``[total_q, heads, value_features]``; with
        ``return_lse`` also ``[batch, heads, queries]``, or ``[heads, total_q]``: -inf for a query
        that sees no key.

    Raises:
        TypeError: An argument that is to be a tensor is none.
        ValueError: An argument is out of its range or has another shape.
        RuntimeError: No backend takes the tensors.
    """
    sequences = cu_seqlens_q is not None
    _check_tensors(query=query, key=key, value=value)
    _check_optional(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink, attn_mask=attn_mask,
    )  # fmt: skip
    _check_shapes(query, key, value, sequences)
    if not (is_scalar(dropout_p) and 0 <= dropout_p < 1):
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    if not (is_scalar(softcap) and 0 <= softcap < math.inf):
        raise ValueError(f"softcap must be finite and not negative, got {softcap!r}")
    if scale is not None and not (is_scalar(scale) and -math.inf < scale < math.inf):
        raise ValueError(f"scale must be finite, got {scale!r}")
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or not all(isinstance(n, int) for n in window_size) or min(window_size) < -1:
        raise ValueError(
            f"window_size must be a pair of whole numbers from -1 on, got {window_size}"
        )
    left, right = window_size
    for name, longest, given in (
        ("q", max_seqlen_q, cu_seqlens_q),
        ("k", max_seqlen_k, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k),
    ):
        if longest is not None and not isinstance(longest, (int, torch.SymInt)):
            raise TypeError(f"max_seqlen_{name} must be a whole number or None, got {longest!r}")
        if longest is not None and given is None:
            raise ValueError(f"max_seqlen_{name} needs cu_seqlens_{name}, got {longest} alone")
    starts = key_starts = None
    if cu_seqlens_q is not None:
        if attn_mask is not None:
            raise ValueError("attn_mask does not go with cu_seqlens_q, got both")
        starts = _starts("q", cu_seqlens_q, max_seqlen_q)
        key_starts = starts
        if cu_seqlens_k is not None or max_seqlen_k is not None:
            given = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
            key_starts = _starts("k", given, max_seqlen_k)
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens_q, got it alone")
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
    batch = query.size(0) if starts is None else starts.size(0) - 1
    heads = query.size(1)
    slopes = alibi_slopes
    if slopes is not None:
        if slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must be [heads] or [batch, heads], got {tuple(slopes.shape)}"
            )
        if slopes.is_complex():
            raise ValueError(f"alibi_slopes must be real, got {slopes.dtype}")
        slopes = slopes.expand(batch, heads)
    if learnable_sink is not None and not (
        learnable_sink.shape == (heads,) and learnable_sink.is_floating_point()
    ):
        raise ValueError(
            f"learnable_sink must be real [heads], got {learnable_sink.dtype} "
            f"{tuple(learnable_sink.shape)}"
        )
    request = _request(
        query, key, value, attn_mask, scale,
        slopes=slopes, sinks=learnable_sink, query_starts=starts, key_starts=key_starts,
        used_keys=_used_keys(cache_seqlens, batch, query, key.size(2)), dropout=float(dropout_p),
        softcap=float(softcap), left=left, right=0 if causal else right, bottom_right=True,
    )  # fmt: skip
    result = run_attention(request, backend)
    if result is None:
        if return_lse:
            raise RuntimeError("backend 'torch' cannot return logsumexp")
        return torch_functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, request.right == 0, scale=scale,
            enable_gqa=True,
        )  # fmt: skip
    output, logsumexp = result
    if sequences:
        output, logsumexp = output.squeeze(0).transpose(0, 1), logsumexp.squeeze(0)
    return (output, logsumexp) if return_lse else output


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
    request = _request(query, key, value, attn_mask, None, dropout=float(dropout_p))
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
    if mask is not None and not 2 <= mask.dim() <= query.dim():
        return False
    return enable_gqa or query.size(-3) == key.size(-3)


def _request(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    kind: type[AttentionRequest] = AttentionRequest,
    **options: Any,
) -> AttentionRequest:
    lower = autocast_dtype(query.device)
    if lower is not None:  # autocast runs attention in its lower precision
        query, key, value = (_autocast(tensor, lower) for tensor in (query, key, value))
    if query.dim() == 3:  # heads without a batch
        query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
    bias = allowed = None
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        if mask.dtype is torch.bool:
            allowed = mask
        else:
            bias = mask if lower is None else _autocast(mask, lower)
    usual = 1 / math.sqrt(max(query.size(-1), 1))
    return kind(
        query, key, value, bias, allowed, scale=usual if scale is None else float(scale), **options
    )


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(dtype)


def _are_meant(
    query: object, key: object, value: object, mask: object, dropout: object, scale: object
) -> bool:
    """Whether arguments are of the types that torch's function takes."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    numbers = (dropout,) if scale is None else (dropout, scale)
    return all(isinstance(tensor, Tensor) for tensor in tensors) and all(map(is_scalar, numbers))


def _check_tensors(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a tensor, got {argument!r}")
        if argument.layout is not torch.strided:
            raise ValueError(f"{name} must be strided, got layout {argument.layout}")


def _check_optional(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if argument is not None and not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {argument!r}")
    _check_tensors(**{name: given for name, given in arguments.items() if given is not None})


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, sequences: bool) -> None:
    form = "[rows, heads, features] with cu_seqlens_q" if sequences else "4 dimensions"
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != (3 if sequences else 4):
            raise ValueError(f"{name} must have {form}, got shape {tuple(tensor.shape)}")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have a row for each of key's, got {shapes}")
    if key.size(-1) != query.size(-1):
        raise ValueError(f"key must have the features of query, got {shapes}")
    if not sequences and key.size(0) != query.size(0):
        raise ValueError(f"key must have the batch of query, got {shapes}")
    if key.size(1) == 0 or query.size(1) % key.size(1):
        raise ValueError(f"heads of query must be a multiple of those of key, got {shapes}")


def _check_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    if not 2 <= mask.dim() <= 4:
        raise ValueError(f"attn_mask must have 2 to 4 dimensions, got {tuple(mask.shape)}")
    scores = *query.shape[:3], key.size(2)
    if any(m not in (1, n) for m, n in zip(mask.shape[::-1], scores[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to {scores}, got {tuple(mask.shape)}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on {query.device}, got one on {mask.device}")


def _starts(side: str, starts: Tensor, longest: int | None) -> Tensor:
    if starts.dim() != 1 or starts.size(0) < 2 or starts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens_{side} must be int32 or int64 [batch + 1], got {starts.dtype} "
            f"{tuple(starts.shape)}"
        )
    if longest is not None and can_be_read_now(starts):
        found = int(starts.diff().max())
        if longest < found:
            raise ValueError(
                f"max_seqlen_{side} must be at least {found}, the longest sequence, got {longest}"
            )
    return _narrowed(f"cu_seqlens_{side}", starts)


def _narrowed(name: str, numbers: Tensor) -> Tensor:
    """As int32, which kernels read."""
    narrow = numbers.to(torch.int32)
    if can_be_read_now(numbers) and not torch.equal(narrow.to(numbers.dtype), numbers):
        raise ValueError(f"{name} must fit 32 bits, got {numbers.tolist()}")
    return narrow


def _used_keys(lengths: int | Tensor | None, batch: int, query: Tensor, keys: int) -> Tensor | None:
    if lengths is None:
        return None
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        if not 0 <= lengths <= keys:
            raise ValueError(
                f"cache_seqlens must be one number for each sequence, from 0 to its keys, "
                f"got {[lengths] * batch}"
            )
        lengths = query.new_full((batch,), lengths, dtype=torch.int64)
    found: Any = lengths
    if isinstance(lengths, Tensor):
        if lengths.shape == (batch,) and lengths.dtype in (torch.int32, torch.int64):
            return _narrowed("cache_seqlens", lengths)
        found = f"{lengths.dtype} {tuple(lengths.shape)}"
    raise ValueError(f"cache_seqlens must be a number or int32 or int64 [batch], got {found}")


def _nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor | None:
    """Of jagged tensors ``[batch, heads, ragged, features]``; None: that is torch's."""
    if mask is not None or not 0 <= dropout < 1:
        return None
    nested: Any = query, key, value  # torch types what nested tensors add nowhere
    if not all(map(_is_jagged, nested)) or query.shape[:2] != key.shape[:2]:
        return None
    starts, key_starts, value_starts = (tensor.offsets() for tensor in nested)
    if key.shape[:2] != value.shape[:2]:
        return None
    if key_starts is not value_starts and not torch.equal(key_starts, value_starts):
        return None
    q, k, v = (tensor.values().unsqueeze(0) for tensor in (query, key, value))
    request = _request(
        q, k, v, None, scale, query_starts=starts.to(torch.int32),
        key_starts=key_starts.to(torch.int32), dropout=float(dropout),
        right=0 if is_causal else -1,
    )  # fmt: skip
    result = run_attention(request)
    if result is None:
        return None
    return torch.nested.nested_tensor_from_jagged(result[0].squeeze(0), starts, jagged_dim=2)


def _is_jagged(tensor: Any) -> bool:
    """Whether its sequences lie behind each other without a gap, heads before them."""
    return bool(
        tensor.is_nested
        and tensor.layout is torch.jagged
        and tensor.dim() == 4
        and tensor._ragged_idx == 2
        and tensor.lengths() is None
    )

"""Hugging Face transformers: importing this registers ``attn_implementation="fastopt"``.

The optimizers need nothing of the kind: ``Trainer(..., optimizer_cls_and_kwargs=(AdamW, {...}))``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fastopt.nn.functional import attention, scaled_dot_product_attention

NAME = "fastopt"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What ``transformers.AttentionInterface`` calls, with the rules of its ``sdpa``.

    Softcaps and sinks, which its ``sdpa`` has not got, run in the kernels too. A sliding window is
    in the mask.

    Args:
        module: The model's attention, whose ``is_causal`` counts where none is given.
        query: ``[batch, heads, queries, features]``.
        key: ``[batch, key_heads, keys, features]``.
        value: ``[batch, key_heads, keys, value_features]``.
        attention_mask: Broadcasts to ``[batch, heads, queries, keys]``: bool, True where a key is
            seen, or added to the scores. None: all keys, or where causal those up to the query.
        dropout: Probability with which a weight is dropped.
        scaling: Of the scores; ``1 / sqrt(features)`` by default.
        is_causal: Whether query ``i`` sees the keys up to ``i`` only, without a mask; a single
            query, as in decoding, sees all.
        position_bias: Added to the scores, ``[1 or batch, heads, queries, keys]``.
        softcap: Products ``x`` become ``softcap * tanh(x / softcap)`` (Gemma 2).
        s_aux: ``[heads]``, the score of one more key without a value (GPT-OSS).

    Returns:
        ``[batch, queries, heads, value_features]``, and no weights.
    """
    queries = query.size(2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = queries > 1 and attention_mask is None and causal
    if causal and key.size(2) > queries:  # a cache with room for more
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    if position_bias is not None:
        if causal:
            attention_mask = torch.ones(
                queries, queries, dtype=torch.bool, device=query.device
            ).tril()
            causal = False
        attention_mask = _joined(position_bias, attention_mask)
    if softcap is None and s_aux is None:
        output = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=True
        )
    else:
        output = attention(  # type: ignore[assignment]  # without return_lse
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, causal=causal,
            scale=scaling, softcap=softcap or 0.0, learnable_sink=s_aux,
        )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _joined(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias of the scores and a mask in one."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

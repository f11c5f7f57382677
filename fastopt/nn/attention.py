"""``torch.nn``'s attention modules on fastopt's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from fastopt.nn.functional import attention_with_weights, scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """The twin of ``torch.nn.MultiheadAttention``: constructor, ``state_dict``, results.

    The output comes from the fused attention with ``need_weights`` too; weights are then computed
    beside it, dropout included. A query that may see no key gives zeros in both, where torch gives
    NaN with weights and zeros without. Nested tensors, and what does not fit, are torch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``torch.nn.MultiheadAttention.forward``, with its shapes and its errors.

        Args:
            query: ``[queries, batch, embed_dim]``, ``[batch, queries, embed_dim]`` with
                ``batch_first``, or ``[queries, embed_dim]``.
            key: ``[keys, batch, kdim]``, likewise.
            value: ``[keys, batch, vdim]``, likewise.
            key_padding_mask: ``[batch, keys]``: bool, True where a key is *not* seen, or added to
                the scores.
            need_weights: Return the weights too, which are then in memory.
            attn_mask: ``[queries, keys]`` or ``[batch * heads, queries, keys]``: bool, True where a
                key is *not* seen, or added to the scores.
            average_attn_weights: Average the weights over heads.
            is_causal: A hint that ``attn_mask`` is the causal one.

        Returns:
            The output, in the form of the query, and the weights ``[batch, queries, keys]``, or
            ``[batch, heads, queries, keys]``, or None.
        """
        masks = key_padding_mask, attn_mask
        if not self._fits(query, key, value, *masks) or (is_causal and attn_mask is None):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        batched = query.dim() == 3
        if not batched:
            if query is key is value:
                query = key = value = query.unsqueeze(0)
            else:
                query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
        batch_first = self.batch_first or not batched
        length_dim = 1 if batch_first else 0
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            shape = list(k.shape)
            shape[length_dim] = 1
            k = torch.cat([k, self.bias_k.expand(shape)], length_dim)
            v = torch.cat([v, self.bias_v.expand(shape)], length_dim)
        if self.add_zero_attn:
            nothing = torch.zeros_like(k.narrow(length_dim, 0, 1))
            k, v = (torch.cat([tensor, nothing], length_dim) for tensor in (k, v))
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).permute(order) for t in (q, k, v))
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(*masks, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            output, weights = attention_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            output = scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        # Queries first in memory, as torch has it: dropout draws in that order.
        output = output.permute(2, 0, 1, 3).flatten(-2)
        output = torch_functional.linear(output, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            output = output.squeeze(1)
        elif batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        """Whether torch would compute rather than raise, on tensors that are not nested."""
        if query.is_nested or key.is_nested or value.is_nested or query.dim() not in (2, 3):
            return False
        if not query.dim() == key.dim() == value.dim():
            return False
        widths = self.embed_dim, self.kdim, self.vdim
        if any(t.size(-1) != n for t, n in zip((query, key, value), widths, strict=True)):
            return False
        if key.shape[:-1] != value.shape[:-1]:
            return False
        batched = query.dim() == 3
        length_dim = 1 if self.batch_first and batched else 0
        batch = query.size(1 - length_dim) if batched else 1
        if batched and key.size(1 - length_dim) != batch:
            return False
        queries, keys = query.size(length_dim), key.size(length_dim)
        if attn_mask is not None and attn_mask.shape not in (
            (queries, keys),
            (batch * self.num_heads, queries, keys),
        ):
            return False
        padding = (batch, keys) if batched else (keys,)
        if key_padding_mask is not None and key_padding_mask.shape != padding:
            return False
        return all(
            mask is None or mask.dtype in (torch.bool, query.dtype)
            for mask in (key_padding_mask, attn_mask)
        )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key is value:
            return torch_functional.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases: Any = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(
            torch_functional.linear(tensor, weight, own)
            for tensor, weight, own in zip((query, key, value), weights, biases, strict=True)
        )

    def _mask(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Both masks in one: bool, True where a key is seen, or to be added to the scores."""
        batch, heads, queries, _ = q.shape
        parts = []
        if attn_mask is not None:
            parts.append(
                attn_mask[None, None]
                if attn_mask.dim() == 2
                else attn_mask.view(batch, heads, queries, attn_mask.size(-1))
            )
        if key_padding_mask is not None:
            parts.append(key_padding_mask.view(batch, 1, 1, key_padding_mask.size(-1)))
        if not parts:
            return None
        # What was appended to the keys is seen by all.
        parts = [torch_functional.pad(part, (0, k.size(2) - part.size(-1))) for part in parts]
        if all(part.dtype is torch.bool for part in parts):
            hidden = parts[0] if len(parts) == 1 else parts[0] | parts[1]
            return ~hidden
        added = [
            torch.zeros(part.shape, dtype=q.dtype, device=q.device).masked_fill_(part, -torch.inf)
            if part.dtype is torch.bool
            else part
            for part in parts
        ]
        return added[0] if len(added) == 1 else added[0] + added[1]


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """The twin of ``torch.nn.TransformerEncoderLayer``, which calls its attention in ``eval`` too.

    Torch's runs a fused operator of its own there. Nested tensors still go to it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Its parameters have been drawn: a module of ours, made anew, would draw them again.
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As ``torch.nn.TransformerEncoderLayer.forward``.

        Args:
            src: ``[steps, batch, d_model]``, ``[batch, steps, d_model]`` with ``batch_first``, or
                ``[steps, d_model]``.
            src_mask: As ``attn_mask`` of ``MultiheadAttention``.
            src_key_padding_mask: As its ``key_padding_mask``.
            is_causal: A hint that ``src_mask`` is the causal one.

        Returns:
            What the layer makes of ``src``, in its form.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = src_mask, src_key_padding_mask
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        return self.norm2(src + self._ff_block(src))  # type: ignore[no-any-return]


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """The twin of ``torch.nn.TransformerDecoderLayer``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        self.multihead_attn.__class__ = MultiheadAttention

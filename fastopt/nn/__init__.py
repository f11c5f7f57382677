"""The names and arguments of ``torch.nn``, on fastopt's kernels."""

from fastopt.nn import attention_self_check, functional, utils  # noqa: F401  # registers itself
from fastopt.nn.attention import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastopt.nn.lstm import LSTM

__all__ = [
    "LSTM",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "functional",
    "utils",
]

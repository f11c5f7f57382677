"""The names and arguments of ``torch.nn``, on fastopt's kernels."""

from fastopt.nn import functional, self_check, utils  # noqa: F401  # the check registers itself
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

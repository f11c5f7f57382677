"""The names and arguments of ``torch.nn``, on fastopt's kernels."""

from fastopt.nn import (  # noqa: F401  # the checks register themselves
    attention_self_check,
    functional,
    linear_cross_entropy_self_check,
    lstm_self_check,
    utils,
)
from fastopt.nn.attention import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastopt.nn.linear_cross_entropy import LinearCrossEntropyLoss, LinearCrossEntropyOptions
from fastopt.nn.lstm import LSTM

__all__ = [
    "LSTM",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "functional",
    "utils",
]

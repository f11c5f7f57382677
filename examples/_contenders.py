"""Who trains a model: stock, fastopt, and what lies between them."""

from __future__ import annotations

from typing import Any

import torch
from _contest import Contender
from _tail import FusedTail

from fastopt import nn, optim

STOCK = ("stock", "stock, fused")


def five_ways(
    optimizer: str, part: str, stock: Any, fast: Any, fastest: Any = None
) -> tuple[Contender, ...]:
    """Stock as most people write it, stock at its best, fastopt's optimizer, its part, and both.

    ``part`` names what ``stock`` and ``fast`` are; ``fastest`` goes with fastopt's optimizer.
    """
    theirs, ours = getattr(torch.optim, optimizer), getattr(optim, optimizer)
    return (
        Contender("stock", theirs, part=stock),
        Contender("stock, fused", theirs, {"fused": True}, part=stock),
        Contender("fastopt optimizer", ours, tail=FusedTail, part=stock),
        Contender(f"fastopt {part}", theirs, {"fused": True}, part=fast),
        Contender("fastopt", ours, tail=FusedTail, part=fastest or fast),
    )


CONTENDERS = five_ways("Adam", "LSTM", torch.nn.LSTM, nn.LSTM)

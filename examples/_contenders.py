"""Who trains an LSTM: stock, fastopt, and what lies between them."""

from __future__ import annotations

import torch
from _contest import Contender
from _tail import FusedTail

from fastopt import nn, optim

CONTENDERS = (
    Contender("stock", torch.optim.Adam),
    Contender("stock, fused", torch.optim.Adam, {"fused": True}),
    Contender("fastopt optimizer", optim.Adam, tail=FusedTail),
    Contender("fastopt LSTM", torch.optim.Adam, {"fused": True}, part=nn.LSTM),
    Contender("fastopt", optim.Adam, tail=FusedTail, part=nn.LSTM),
)
STOCK = ("stock", "stock, fused")

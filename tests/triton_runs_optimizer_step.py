"""Every kernel of the optimizers, for ``triton_builds.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cards import read_on_card
from fastopt import optim
from fastopt.backends import registry
from fastopt.backends.triton.backend import TritonBackend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RULES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "sgd": (optim.SGD, {}),
    "momentum": (optim.SGD, {"momentum": 0.9}),
    "nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (optim.AdamW, {}),
    "amsgrad": (optim.Adam, {"amsgrad": True}),
    "lion": (optim.Lion, {}),
}


def step(rule: str, dtype: torch.dtype, backend: TritonBackend) -> None:
    """Measures and steps; what hangs on nothing but numbers is a branch of the same kernels."""
    registry.BACKENDS["triton"] = backend
    param = torch.nn.Parameter(torch.ones(5000, dtype=dtype))
    param.grad = torch.ones_like(param)
    make, options = RULES[rule]
    read_on_card(make([param], **options, max_grad_norm=1.0, backend="triton")).step()


RUNS: dict[str, Callable[[TritonBackend], None]] = {
    f"{rule}, {dtype}": partial(step, rule, dtype) for rule in RULES for dtype in DTYPES
}

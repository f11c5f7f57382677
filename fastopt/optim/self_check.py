"""The parity cases that the optimizers' kernels have to pass on a card before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt.backends.selfcheck import Outcome, register
from fastopt.backends.state_codes import STORAGE_OPTIONS
from fastopt.optim.adagrad import Adagrad
from fastopt.optim.adam import Adam
from fastopt.optim.adamax import Adamax
from fastopt.optim.adamw import AdamW
from fastopt.optim.lamb import LAMB
from fastopt.optim.lion import Lion
from fastopt.optim.nadam import NAdam
from fastopt.optim.radam import RAdam
from fastopt.optim.rmsprop import RMSprop
from fastopt.optim.schedule_free_adamw import ScheduleFreeAdamW
from fastopt.optim.sgd import SGD

# Odd, empty, longer than a block's share; the last is a transposed view.
SHAPES = ((), (0,), (7,), (1000,), (4097,), (33, 40))
STEPS = 3

# The reference rounds once, as the kernels do.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}

TAIL = {"max_grad_norm": 1.0, "zero_grad_after_step": True, "ema_decay": 0.9, "clip_value": 0.4}
# What stock has not.
ONLY_OURS = {*TAIL, *STORAGE_OPTIONS}
# With rates and weights that are powers of two, what is encoded is the reference's to the bit.
EIGHT_BITS = {"state_storage": "8bit", "min_8bit_size": 0}
# A larger eps than the default: half precision would lose it.
CASES: tuple[tuple[str, type[Any], dict[str, Any], torch.dtype], ...] = (
    ("SGD", SGD, {"lr": 0.1, "weight_decay": 0.1}, torch.float32),
    ("SGD with momentum", SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}, torch.float32),
    ("SGD with Nesterov momentum", SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True},
     torch.float64),
    ("Adam", Adam, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}, torch.float32),
    ("Adam, amsgrad", Adam, {"lr": 0.01, "eps": 1e-3, "amsgrad": True}, torch.float16),
    ("AdamW", AdamW, {"lr": 0.01, "eps": 1e-3, "maximize": True}, torch.bfloat16),
    ("AdamW, clipped and averaged", AdamW, {"lr": 0.01, "eps": 1e-3, **TAIL}, torch.float32),
    ("Adam, counted on the card", Adam, {"lr": 0.01, "eps": 1e-3, "fused": True, "clip_value": 0.4},
     torch.float64),
    ("Lion", Lion, {"lr": 0.01, "weight_decay": 0.1}, torch.float32),
    ("Adagrad", Adagrad, {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3}, torch.float32),
    ("RMSprop", RMSprop, {"lr": 0.01, "eps": 1e-3}, torch.float32),
    ("RMSprop with momentum", RMSprop, {"lr": 0.01, "eps": 1e-3, "momentum": 0.9}, torch.bfloat16),
    ("RMSprop, centered", RMSprop, {"lr": 0.01, "eps": 1e-3, "centered": True}, torch.float64),
    ("RMSprop, centered with momentum", RMSprop,
     {"lr": 0.01, "eps": 1e-3, "centered": True, "momentum": 0.9}, torch.float32),
    ("Adamax", Adamax, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}, torch.float32),
    # Rectified from the third step on.
    ("RAdam", RAdam, {"lr": 0.01, "betas": (0.9, 0.9), "eps": 1e-3}, torch.float32),
    ("NAdam", NAdam, {"lr": 0.01, "eps": 1e-3}, torch.float32),
    ("NAdam, counted on the card", NAdam, {"lr": 0.01, "eps": 1e-3, "capturable": True},
     torch.float64),
    ("ScheduleFreeAdamW", ScheduleFreeAdamW, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1},
     torch.float32),
    ("SGD with momentum in 8 bits", SGD, {"lr": 2**-4, "momentum": 0.5, **EIGHT_BITS},
     torch.float32),
    ("AdamW in 8 bits, rounded by chance", AdamW,
     {"lr": 0.01, "betas": (0.0, 0.5), "eps": 1e-3, "param_precision": "stochastic", **EIGHT_BITS},
     torch.bfloat16),
    ("Lion with masters", Lion,
     {"lr": 2**-6, "betas": (0.5, 0.75), "weight_decay": 0.0, "param_precision": "master"},
     torch.bfloat16),
    ("LAMB", LAMB, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}, torch.float32),
    ("LAMB, clipped and averaged", LAMB,
     {"lr": 0.01, "eps": 1e-3, "adam_w_mode": False, "weight_decay": 0.1, **TAIL}, torch.bfloat16),
    ("LAMB without a trust ratio", LAMB,
     {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.0, "bias_correction": False}, torch.float64),
)  # fmt: skip


def check_optimizers(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Trains a few tensors with the kernels and with stock, or the reference where stock has none.

    In low precision stock rounds more often, so the reference stands in there too.
    """
    for name, cls, options, dtype in CASES:
        yield Outcome(name, _compare(cls, options, dtype, device, backend))


def _compare(
    cls: type[Any], options: dict[str, Any], dtype: torch.dtype, device: torch.device, backend: str
) -> str:
    ours, theirs = _parameters(dtype, device), _parameters(dtype, device)
    optimizer = cls(ours, **options, backend=backend)
    stock = getattr(torch.optim, cls.__name__, None)
    has_stock = stock is not None and dtype in (torch.float32, torch.float64)
    # The same numbers, also where the host plays the card.
    counted_on_host = {name: value for name, value in options.items() if name != "capturable"}
    other: Optimizer
    if has_stock and stock is not None and not ONLY_OURS & options.keys():
        other = stock(theirs, **counted_on_host, foreach=False)
    else:
        other = cls(theirs, **counted_on_host, backend="reference")
    for either in (optimizer, other):
        getattr(either, "train", lambda: None)()  # where it is a mode
    for step in range(STEPS):
        for index, (mine, twin) in enumerate(zip(ours, theirs, strict=True)):
            twin.grad = _values(tuple(mine.shape), dtype, device, 100 * step + index)
            mine.grad = twin.grad.clone()
            if index == 3 and step == 1:
                mine.grad = twin.grad = None
        optimizer.step()
        other.step()
    tolerance = TOLERANCES[dtype]
    for mine, twin in zip(ours, theirs, strict=True):
        pairs = [(mine, twin)]
        pairs += [(optimizer.state[mine][key], v) for key, v in other.state[twin].items()]
        for actual, expected in pairs:
            try:
                torch.testing.assert_close(
                    actual.detach().cpu(), expected.detach().cpu(), rtol=tolerance, atol=tolerance
                )
            except AssertionError as error:
                return f"shape {list(mine.shape)}: {' '.join(str(error).split())}"
    return ""


def _parameters(dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    values = [_values(shape, dtype, device, seed) for seed, shape in enumerate(SHAPES)]
    return [torch.nn.Parameter(tensor) for tensor in (*values[:-1], values[-1].t())]


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


register("optimizer_step", check_optimizers)

"""Optimizers and their options as data: a new optimizer is one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastopt import optim

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

# Empty, one, vector edges, the tile of the kernels and its neighbours, several dimensions.
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (1,),
    (7,),
    (63,),
    (64, 3),
    (511,),
    (512,),
    (513,),
    (1000,),
    (2, 0, 3),
    (5, 4, 3, 2),
    (3, 1400),
)


@dataclass(frozen=True)
class OptimizerCase:
    """One configuration; ``stock`` is None where torch has no such optimizer."""

    name: str
    ours: type[optim.SGD] | type[optim.Adam] | type[optim.Lion]
    stock: type[torch.optim.Optimizer] | None
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any, **more: Any) -> Any:
        """Our optimizer."""
        return self.ours(params, **self.options, **more)

    def make_stock(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """Torch's, as a loop over the parameters."""
        assert self.stock is not None
        return self.stock(params, **self.options, foreach=False, **more)


def _sgd(name: str, **options: Any) -> OptimizerCase:
    return OptimizerCase(name, optim.SGD, torch.optim.SGD, {"lr": 0.1, **options})


def _adam(name: str, **options: Any) -> OptimizerCase:
    return OptimizerCase(name, optim.Adam, torch.optim.Adam, {"lr": 0.01, **options})


def _adamw(name: str, **options: Any) -> OptimizerCase:
    return OptimizerCase(name, optim.AdamW, torch.optim.AdamW, {"lr": 0.01, **options})


# eps is large enough to survive in half precision, where stock keeps the denominator.
EPS = 1e-2

WITH_STOCK = (
    _sgd("sgd"),
    _sgd("sgd-l2-maximize", weight_decay=0.1, maximize=True),
    _sgd("momentum", momentum=0.9),
    _sgd("momentum-dampening-l2", momentum=0.9, dampening=0.3, weight_decay=0.1),
    _sgd("nesterov", momentum=0.9, nesterov=True),
    _sgd("nesterov-l2-maximize", momentum=0.8, nesterov=True, weight_decay=0.1, maximize=True),
    _adam("adam", eps=EPS),
    _adam("adam-l2", eps=EPS, weight_decay=0.1, betas=(0.8, 0.99)),
    _adam("adam-amsgrad-maximize", eps=EPS, amsgrad=True, maximize=True),
    _adam("adam-decoupled", eps=EPS, decoupled_weight_decay=True, weight_decay=0.1),
    _adamw("adamw", eps=EPS),
    _adamw("adamw-amsgrad", eps=EPS, weight_decay=0.3, amsgrad=True),
    _adamw("adamw-no-decay-maximize", eps=EPS, weight_decay=0.0, maximize=True),
)
WITHOUT_STOCK = (
    OptimizerCase(
        "classical", optim.SGD, None, {"lr": 0.1, "momentum": 0.9, "classical_momentum": True}
    ),
    OptimizerCase(
        "classical-nesterov-l2",
        optim.SGD,
        None,
        {
            "lr": 0.1,
            "momentum": 0.9,
            "classical_momentum": True,
            "nesterov": True,
            "weight_decay": 0.1,
        },
    ),
    OptimizerCase("lion", optim.Lion, None, {"lr": 0.01}),
    OptimizerCase(
        "lion-decay-maximize", optim.Lion, None, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}
    ),
)
ALL = WITH_STOCK + WITHOUT_STOCK


def random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values, drawn in double precision."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def parameters(
    dtype: torch.dtype, seed: int = 0, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[torch.nn.Parameter]:
    """One parameter for each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(random(shape, dtype, generator)) for shape in shapes]


def clones(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Equal parameters, strides kept."""
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def train(
    optimizer: torch.optim.Optimizer,
    params: list[torch.nn.Parameter],
    *,
    steps: int = 5,
    seed: int = 1,
    gradient: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> None:
    """Steps with random gradients; every third one of a parameter is missing."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for index, param in enumerate(params):
            grad = gradient(random(tuple(param.shape), param.dtype, generator))
            param.grad = None if (step + index) % 3 == 2 else grad
        optimizer.step()

"""Optimizers and their options as data: a new optimizer is one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import optim
from fastopt.optim.fused_optimizer import FusedOptimizer

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
    ours: type[FusedOptimizer]
    stock: type[torch.optim.Optimizer] | None
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any, **more: Any) -> Any:
        """Our optimizer, ready to step."""
        optimizer: Any = self.ours(params, **{**self.options, **more})
        if isinstance(optimizer, optim.ScheduleFreeAdamW):
            optimizer.train()
        return optimizer

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


def _twin(name: str, cls: str, **options: Any) -> OptimizerCase:
    twins = getattr(optim, cls), getattr(torch.optim, cls)
    return OptimizerCase(name, *twins, {"lr": 0.01, "eps": EPS, **options})


def _schedule_free(name: str, **options: Any) -> OptimizerCase:
    options = {"lr": 0.01, "eps": EPS, **options}
    return OptimizerCase(name, optim.ScheduleFreeAdamW, None, options)


def _lamb(name: str, **options: Any) -> OptimizerCase:
    options = {"lr": 0.01, "eps": EPS, "max_grad_norm": None, **options}
    return OptimizerCase(name, optim.LAMB, None, options)


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
    _twin("adagrad", "Adagrad"),
    _twin("adagrad-decays", "Adagrad", lr_decay=0.1, weight_decay=0.1),
    _twin("adagrad-sum-maximize", "Adagrad", initial_accumulator_value=0.5, maximize=True),
    _twin("rmsprop", "RMSprop"),
    _twin("rmsprop-momentum-l2", "RMSprop", alpha=0.8, momentum=0.9, weight_decay=0.1),
    _twin("rmsprop-centered", "RMSprop", centered=True),
    _twin("rmsprop-centered-momentum-maximize", "RMSprop", alpha=0.8, centered=True, momentum=0.9,
          maximize=True),
    _twin("adamax", "Adamax"),
    _twin("adamax-l2-maximize", "Adamax", weight_decay=0.1, maximize=True),
    _twin("radam-l2", "RAdam", weight_decay=0.1),
    # Rectified from the third step on.
    _twin("radam-decoupled-maximize", "RAdam", betas=(0.9, 0.9), weight_decay=0.1,
          decoupled_weight_decay=True, maximize=True),
    _twin("nadam-l2", "NAdam", weight_decay=0.1, momentum_decay=0.1),
    _twin("nadam-decoupled-maximize", "NAdam", weight_decay=0.1, decoupled_weight_decay=True,
          maximize=True),
)  # fmt: skip
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
    _schedule_free("schedule-free", weight_decay=0.1),
    _schedule_free("schedule-free-warm-up", betas=(0.8, 0.99), warmup_steps=3, r=1.0),
    _lamb("lamb", weight_decay=0.1),
    _lamb("lamb-l2-maximize", weight_decay=0.1, adam_w_mode=False, maximize=True),
    _lamb("lamb-no-decay", weight_decay=0.0, grad_averaging=False),
    _lamb("lamb-nvlamb-uncorrected", weight_decay=0.0, use_nvlamb=True, bias_correction=False),
)
ALL = WITH_STOCK + WITHOUT_STOCK

# State of one number: in fp32 whatever the parameter is.
COUNTERS = ("step", "mu_product")


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


class StoredCase(NamedTuple):
    """An optimizer by name, how its state and parameters are stored, what surrounds its step."""

    maker: str
    dtype: torch.dtype
    storage: str | None
    precision: str | None
    tail: dict[str, Any]

    @property
    def name(self) -> str:
        """For pytest."""
        return "-".join(str(part) for part in (*self[:4], "tail" if self.tail else "plain"))

"""Every kernel of the optimizers, for ``triton_builds.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from cards import read_on_card
from cases import ALL, OptimizerCase
from fastopt.backends import registry
from fastopt.backends.triton.backend import TritonBackend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A dtype, state_storage and param_precision each.
CODED: tuple[tuple[str, torch.dtype, str | None, str | None], ...] = (
    ("adam", torch.float32, "8bit", None),
    ("adam", torch.float32, "bf16", None),
    ("adam", torch.float16, "fp32", None),
    ("adam", torch.bfloat16, "8bit", "master"),
    ("amsgrad", torch.bfloat16, "8bit", "stochastic"),
    ("lion", torch.bfloat16, "bf16", "kahan"),
    ("sgd", torch.bfloat16, None, "stochastic"),
)


def rule_of(case: OptimizerCase) -> str:
    """The update rule that a case runs."""
    optimizer = case.make([torch.nn.Parameter(torch.ones(1))])
    rule: str = optimizer._update_rule(optimizer.param_groups[0]).name
    return rule


# What else tells cases apart are numbers: branches of the same kernels.
RULES = {rule_of(case): case for case in ALL}


def step(
    case: OptimizerCase, dtype: torch.dtype, backend: TritonBackend, **storage: str | None
) -> None:
    """Measures and steps."""
    registry.BACKENDS["triton"] = backend
    param = torch.nn.Parameter(torch.ones(5000, dtype=dtype))
    param.grad = torch.ones_like(param)
    read_on_card(case.make([param], max_grad_norm=1.0, backend="triton", **storage)).step()


RUNS: dict[str, Callable[[TritonBackend], None]] = {
    f"{rule}, {dtype}": partial(step, case, dtype)
    for rule, case in RULES.items()
    for dtype in DTYPES
} | {
    f"{rule}, {dtype}, {storage}, {precision}": partial(
        step, RULES[rule], dtype, state_storage=storage, param_precision=precision
    )
    for rule, dtype, storage, precision in CODED
}

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


def rule_of(case: OptimizerCase) -> str:
    """The update rule that a case runs."""
    optimizer = case.make([torch.nn.Parameter(torch.ones(1))])
    rule: str = optimizer._update_rule(optimizer.param_groups[0]).name
    return rule


# What else tells cases apart are numbers: branches of the same kernels.
RULES = {rule_of(case): case for case in ALL}


def step(case: OptimizerCase, dtype: torch.dtype, backend: TritonBackend) -> None:
    """Measures and steps."""
    registry.BACKENDS["triton"] = backend
    param = torch.nn.Parameter(torch.ones(5000, dtype=dtype))
    param.grad = torch.ones_like(param)
    read_on_card(case.make([param], max_grad_norm=1.0, backend="triton")).step()


RUNS: dict[str, Callable[[TritonBackend], None]] = {
    f"{rule}, {dtype}": partial(step, case, dtype)
    for rule, case in RULES.items()
    for dtype in DTYPES
}

"""Everyone who takes part in a case: ours, stock in all its forms, and peers where installed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

import fastopt
from bench.cases import OptimizerCase

Step = Callable[[], object]

OURS = "fastopt"
# "The best of stock" is sought among these.
STOCK = ("torch default", "torch foreach", "torch fused", "torch fused, 1 thread", "torch compiled")


def make_parameters(case: OptimizerCase) -> list[torch.nn.Parameter]:
    """The case's parameters with gradients, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in case.shapes:
        values = torch.randn(shape, generator=generator).to(case.dtype)
        grad = (torch.randn(shape, generator=generator) * 0.1).to(case.dtype)
        param = torch.nn.Parameter(values.t() if case.transposed else values)
        param.grad = grad
        params.append(param)
    return params


def optimizer_contenders(case: OptimizerCase) -> dict[str, Step]:
    """A step for everyone, state made and warm."""
    ours = getattr(fastopt.optim, case.optimizer)
    steps: dict[str, Step] = {OURS: ours(make_parameters(case), **case.options).step}
    stock = getattr(torch.optim, case.optimizer, None)
    if stock is None:
        composed = ours(make_parameters(case), **case.options, backend="torch")
        steps["torch default"] = composed.step
        return steps
    for name, flags in (
        ("torch default", {}),
        ("torch foreach", {"foreach": True}),
        ("torch fused", {"fused": True}),
    ):
        if case.transposed and name == "torch fused":
            continue  # silently wrong there
        steps[name] = stock(make_parameters(case), **case.options, **flags).step
    if case.threads > 1 and not case.transposed:
        single = stock(make_parameters(case), **case.options, fused=True)
        steps["torch fused, 1 thread"] = _on_one_thread(single.step, case.threads)
    if case.compiled:
        steps["torch compiled"] = _compiled(stock, case)
    if deepspeed := _deepspeed(case):
        steps["DeepSpeed CPUAdam"] = deepspeed
    return steps


def _on_one_thread(step: Step, threads: int) -> Step:
    def run() -> None:
        torch.set_num_threads(1)
        step()
        torch.set_num_threads(threads)

    return run


def _compiled(stock: Any, case: OptimizerCase) -> Step:
    optimizer = stock(make_parameters(case), **case.options, foreach=True)
    # A learning rate that changes would compile anew; stock's advice is a tensor.
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
        group["foreach"] = None
    step: Step = torch.compile(optimizer.step)
    return step


def _deepspeed(case: OptimizerCase) -> Step | None:
    if case.optimizer != "AdamW" or case.dtype is not torch.float32 or case.transposed:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return None
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    step: Step = DeepSpeedCPUAdam(make_parameters(case), **case.options, adamw_mode=True).step
    return step


# Rounding once per stored value and step, three steps.
PARITY = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def check_parity(case: OptimizerCase) -> None:
    """Refuses to time a step that gives other numbers than the reference in double precision.

    Raises:
        AssertionError: The parameters differ after three steps.
    """
    clipped = tuple(tuple(min(size, 64) for size in shape) for shape in case.shapes[:8])
    small = dataclasses.replace(case, shapes=clipped)
    ours, truth = make_parameters(small), make_parameters(small)
    cls = getattr(fastopt.optim, case.optimizer)
    optimizers = cls(ours, **case.options), cls(truth, **case.options, backend="reference")
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    tolerance = PARITY[case.dtype]
    for left, right in zip(ours, truth, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)

"""Everyone who takes part in an optimizer's case: ours, stock in all its forms, and peers."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastopt
from bench.optimizer_cases import LARGE, MAX_GRAD_NORM, OWN_FP32, OptimizerCase
from bench.timing import OURS, Contender, on_one_thread

Step = Callable[[], object]

# "The best of stock" is sought among these.
STOCK = ("torch default", "torch foreach", "torch fused", "torch fused, 1 thread", "torch compiled")
PEERS = ("DeepSpeed CPUAdam",)
BANDWIDTH_PROBE = "add_ of 16.8M"


def make_parameters(case: OptimizerCase) -> list[torch.nn.Parameter]:
    """The case's parameters with gradients, the same for every contender."""
    generator = torch.Generator(case.device).manual_seed(0)
    params = []
    for shape in case.shapes:
        values, grad = (
            torch.randn(shape, generator=generator, device=case.device).mul_(size).to(case.dtype)
            for size in (1.0, 0.1)
        )
        param = torch.nn.Parameter(values.t() if case.transposed else values)
        param.grad = grad
        params.append(param)
    return params


def optimizer_contenders(case: OptimizerCase) -> dict[str, Contender]:
    """A step for everyone, state made and warm; ``add_`` in the same rounds measures bandwidth."""
    contenders = _stepping_contenders(case) if case.optimizer else _clipping_contenders(case)
    if case.limit_bar and case.device == "cpu":
        left, right = torch.ones(LARGE), torch.ones(LARGE)
        contenders[BANDWIDTH_PROBE] = Contender(lambda: left.add_(right))
    return contenders


def bandwidth_fraction(case: OptimizerCase, timings: dict[str, Any]) -> float | None:
    """What a step moves in a second, as a fraction of what ``add_`` moves; none unless timed."""
    if BANDWIDTH_PROBE not in timings:
        return None
    ours = case.elements * case.bytes_per_element / timings[OURS]["median"]
    return float(ours / (12 * LARGE / timings[BANDWIDTH_PROBE]["median"]))


def make_ours(case: OptimizerCase, params: list[torch.nn.Parameter], **more: Any) -> Any:
    """Our optimizer, ready to step."""
    optimizer = getattr(fastopt.optim, case.optimizer)(params, **case.options, **more)
    if isinstance(optimizer, fastopt.optim.ScheduleFreeAdamW):
        optimizer.train()
    return optimizer


def _stepping_contenders(case: OptimizerCase) -> dict[str, Contender]:
    params = make_parameters(case)
    optimizer = make_ours(case, params, backend=case.backend, **case.tail, **case.storage)
    contenders = {OURS: _contender(case, params, optimizer.step)}
    if case.storage:
        exact = make_parameters(dataclasses.replace(case, dtype=torch.float32))
        contenders[OWN_FP32] = Contender(make_ours(case, exact, backend=case.backend).step)
    stock = getattr(torch.optim, case.optimizer, None)
    if stock is None:
        composed = make_ours(case, make_parameters(case), backend="torch")
        contenders["torch default"] = Contender(composed.step)
        return contenders
    for name, flags in (
        ("torch default", {}),
        ("torch foreach", {"foreach": True}),
        ("torch fused", {"fused": True}),
    ):
        if case.transposed and name == "torch fused":
            continue  # silently wrong there
        if flags.keys() <= inspect.signature(stock).parameters.keys():
            contenders[name] = _stock(case, stock, flags)
    if case.device == "cpu" and case.threads > 1 and "torch fused" in contenders:
        contenders["torch fused, 1 thread"] = on_one_thread(
            _stock(case, stock, {"fused": True}), case.threads
        )
    if case.compiled:
        contenders["torch compiled"] = Contender(_compiled(stock, case))
    if deepspeed := _deepspeed(case):
        contenders["DeepSpeed CPUAdam"] = Contender(deepspeed)
    return contenders


def _contender(case: OptimizerCase, params: list[torch.nn.Parameter], call: Step) -> Contender:
    """Gradients that are written are what they were before each call, as after a backward."""
    if case.optimizer and not case.tail:
        return Contender(call)
    grads = [param.grad for param in params if param.grad is not None]
    kept = [grad.clone() for grad in grads]
    return Contender(call, lambda: torch._foreach_copy_(grads, kept))


def _stock(case: OptimizerCase, cls: Any, flags: dict[str, Any]) -> Contender:
    """A step of stock's with the calls that do what our options do."""
    params = make_parameters(case)
    optimizer = cls(params, **case.options, **flags)
    if not case.tail:
        return Contender(optimizer.step)
    average: AveragedModel | None = None
    model = torch.nn.ParameterList(params)
    if "ema_decay" in case.tail:
        moving = get_ema_multi_avg_fn(case.tail["ema_decay"])
        average = AveragedModel(model, multi_avg_fn=moving)

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, case.tail["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if average is not None:
            average.update_parameters(model)

    return _contender(case, params, tail)


def _clipping_contenders(case: OptimizerCase) -> dict[str, Contender]:
    def contender(clip: Callable[..., object], **flags: Any) -> Contender:
        params = make_parameters(case)
        return _contender(case, params, lambda: clip(params, MAX_GRAD_NORM, **flags))

    return {
        OURS: contender(fastopt.nn.utils.clip_grad_norm_),
        "torch default": contender(torch.nn.utils.clip_grad_norm_),
        "torch foreach": contender(torch.nn.utils.clip_grad_norm_, foreach=True),
        "torch for-loop": contender(torch.nn.utils.clip_grad_norm_, foreach=False),
    }


def _compiled(stock: Any, case: OptimizerCase) -> Step:
    optimizer = stock(make_parameters(case), **case.options, foreach=True)
    # A learning rate that changes would compile anew; stock's advice is a tensor.
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
        group["foreach"] = None
    step: Step = torch.compile(optimizer.step)
    return step


def _deepspeed(case: OptimizerCase) -> Step | None:
    if case.tail or case.optimizer != "AdamW" or case.dtype is not torch.float32:
        return None
    if case.transposed or case.device != "cpu":
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return None
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    step: Step = DeepSpeedCPUAdam(make_parameters(case), **case.options, adamw_mode=True).step
    return step


# Rounding once per stored value and step, three steps.
PARITY = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Where a sum is rounded otherwise, so may a code be, by an eighth of a step; and on some machines
# Muon's products are those of bf16.
ROUGH_PARITY = 5e-4


def clipped(case: OptimizerCase) -> OptimizerCase:
    """The case with fewer and smaller tensors."""
    shapes = tuple(tuple(min(size, 64) for size in shape) for shape in case.shapes[:8])
    return dataclasses.replace(case, shapes=shapes)


def check_parity(case: OptimizerCase) -> None:
    """Refuses to time a step that gives other numbers than the reference in double precision.

    Raises:
        AssertionError: The parameters differ after three steps.
    """
    small = clipped(case)
    ours, truth = make_parameters(small), make_parameters(small)
    is_rough = case.storage or case.optimizer == "Muon"
    tolerance = max(PARITY[case.dtype], ROUGH_PARITY if is_rough else 0)
    if not case.optimizer:
        fastopt.nn.utils.clip_grad_norm_(ours, MAX_GRAD_NORM)
        torch.nn.utils.clip_grad_norm_(truth, MAX_GRAD_NORM)
        for left, right in zip(ours, truth, strict=True):
            torch.testing.assert_close(left.grad, right.grad, rtol=tolerance, atol=tolerance)
        return
    more = {**case.tail, **case.storage}
    if case.storage:
        more["min_8bit_size"] = 0
    mine = make_ours(case, ours, backend=case.backend, **more)
    optimizers = mine, make_ours(case, truth, backend="reference", **more)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    for left, right in zip(ours, truth, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)

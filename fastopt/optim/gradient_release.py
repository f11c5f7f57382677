"""Gradient release: parameters are updated inside the backward pass, and gradients freed at once.

Lv et al. 2024, "Full Parameter Fine-tuning for Large Language Models with Limited Resources": the
gradients of a model are never in memory together, only those that the backward pass is at.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt.ops.grad_norm import clip_coefficient


class GradientRelease:
    """Steps each parameter of an optimizer as soon as its gradient is complete, and frees it.

    The training loop stays as it is: ``optimizer.step()`` and ``zero_grad()`` find no gradients and
    do nothing. State, checkpoints, parameter groups and schedulers are the optimizer's own. What
    looks at gradients between ``backward()`` and ``step()`` finds none: a ``GradScaler`` cannot
    work, and exact clipping by norm is impossible, as it needs all gradients before the first
    update. ``max_grad_norm`` clips by the norm of the step before instead, and the first step not
    at all. Where norms change slowly that is nearly the same; where one step's norm is a hundred
    times the last one's, that step is not clipped.

    Args:
        optimizer: Of fastopt or torch, with element-wise updates.
        accumulation_steps: Backward passes that make up a step. Gradients stay in between.
        max_grad_norm: To which gradients are clipped by the 2-norm of the step before.

    Raises:
        ValueError: A number is out of range, or the optimizer clips by norm itself.
    """

    grad_norm: Tensor | None = None
    """The norm of the gradients of the last step, before clipping, where they are clipped."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        if getattr(optimizer, "max_grad_norm", None) is not None:
            raise ValueError("optimizer.max_grad_norm must be None: give it to GradientRelease")
        self._optimizer = optimizer
        self._accumulation_steps = accumulation_steps
        self._max_grad_norm = max_grad_norm
        self._squares: list[Tensor] = []  # of the norms so far in this step
        self._end_is_awaited = False
        self._handles = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    own = _OwnOptimizer(optimizer, group, param)
                    self._handles.append(param.register_post_accumulate_grad_hook(self._hook(own)))

    def remove(self) -> None:
        """Leaves gradients to the training loop again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, own: _OwnOptimizer) -> Any:
        passes = 0

        @torch.no_grad()
        def release(param: Tensor) -> None:
            nonlocal passes
            passes += 1
            if passes < self._accumulation_steps:
                return
            passes = 0
            if self._max_grad_norm is not None:
                self._clip(param)
            own.step()
            param.grad = None
            if not self._end_is_awaited:
                self._end_is_awaited = True
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)

        return release

    def _clip(self, param: Tensor) -> None:
        grad = param.grad
        assert grad is not None
        self._squares.append(torch.linalg.vector_norm(grad, dtype=torch.float64).square())
        if self.grad_norm is not None and math.isfinite(self.grad_norm):
            grad.mul_(clip_coefficient(self._max_grad_norm or 0.0, self.grad_norm))

    def _finish(self) -> None:
        """At the end of a backward pass that has stepped parameters."""
        self._end_is_awaited = False
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look at it
        if self._squares:
            first = self._squares[0].device
            squares = torch.stack([square.to(first) for square in self._squares])
            self.grad_norm = squares.sum().sqrt()
            self._squares.clear()


class _OwnOptimizer:
    """An optimizer like another one, of one of its parameters, whose state it shares."""

    def __init__(self, whole: Optimizer, group: dict[str, Any], param: Tensor) -> None:
        self._whole, self._group, self._param = whole, group, param
        self._own = copy.copy(whole)
        self._own.param_groups = [{**group, "params": [param]}]
        self._own.state = defaultdict(dict)

    def step(self) -> None:
        whole, own, param = self._whole, self._own, self._param
        mine = own.param_groups[0]
        mine.update((name, value) for name, value in self._group.items() if name != "params")
        kept = whole.state.get(param)
        if own.state.get(param) is not kept:  # the first step, or a checkpoint has been loaded
            own.state = defaultdict(dict)
            if kept is not None:
                own.state[param] = kept
        own.step()
        if kept is None and param in own.state:
            whole.state[param] = own.state[param]

"""Gradient release: parameters are updated inside the backward pass, and gradients freed at once.

Lv et al. 2024, "Full Parameter Fine-tuning for Large Language Models with Limited Resources": the
gradients of a model are never in memory together, only those that the backward pass is at.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastopt.ops.arguments import check_optimizer, is_scalar
from fastopt.ops.grad_norm import clip_coefficient
from fastopt.ops.optimizer_step import averages_begin
from fastopt.optim.fused_optimizer import FusedOptimizer


class GradientRelease:
    """Steps each parameter of an optimizer as soon as its gradient is complete, and frees it.

    The training loop stays as it is: ``optimizer.step()`` and ``zero_grad()`` find no gradients and
    do nothing. State, options, checkpoints, parameter groups and schedulers are the optimizer's
    own; the hooks of its step run when ``step()`` is called. What looks at gradients between
    ``backward()`` and ``step()`` finds none: a ``GradScaler`` cannot work, and exact clipping by
    norm is impossible, as it needs all gradients before the first update. ``max_grad_norm`` clips
    by the norm of the step before instead, and the first step not at all. Where norms change slowly
    that is nearly the same; where one step's norm is a hundred times the last one's, that step is
    not clipped.

    Gradients that accumulate over several backward passes are kept here, out of reach of
    ``zero_grad()``. A pass is counted once for all parameters, also those that have no gradient in
    it, and also where parts of it are checkpointed with ``use_reentrant=True``. A pass that raises
    leaves what it has stepped; the next one begins a new accumulation.

    The optimizer keeps its release: nobody else has to. Where the optimizer is dropped, gradients
    stay again.

    Args:
        optimizer: Of fastopt or torch, with updates that look at one parameter at a time.
        accumulation_steps: Backward passes that make up a step.
        max_grad_norm: To which gradients are clipped by the 2-norm of the step before.

    Raises:
        TypeError: There is no optimizer.
        ValueError: A number is out of range, the optimizer clips by norm itself, or its step needs
            all parameters at once. A backward pass raises the second too, where
            ``optimizer.max_grad_norm`` has been set since.
        RuntimeError: The optimizer's gradients are released already.
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
        whole = isinstance(accumulation_steps, int) and not isinstance(accumulation_steps, bool)
        if not whole or accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps must be a whole number >= 1, got {accumulation_steps!r}"
            )
        if max_grad_norm is not None and not (is_scalar(max_grad_norm) and max_grad_norm >= 0):
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm!r}")
        check_optimizer(optimizer)
        _refuse_closure(optimizer)
        _refuse_own_clipping(optimizer)
        if getattr(optimizer, "_gradient_release", None) is not None:
            raise RuntimeError("the optimizer has a GradientRelease already: remove() it first")
        self._optimizer = optimizer
        self._accumulation_steps = accumulation_steps
        self._max_grad_norm = max_grad_norm
        self._passes = 0  # of this step, that which is under way included
        self._kept: dict[Tensor, Tensor] = {}  # gradients of the passes before
        self._stepped: set[Tensor] = set()  # in this pass
        self._squares: list[Tensor] = []  # of the norms so far in this step
        self._coefficient = 1.0  # what this step's gradients are clipped by
        # None between passes. The engine alone holds the end of a pass: if that raised, it is gone.
        self._end_of_pass: weakref.ref[Callable[[], None]] | None = None
        self._lock = threading.Lock()  # each device has a thread of the engine
        self._members: dict[Tensor, _OwnOptimizer] = {}
        self._handles: list[RemovableHandle] = []
        self._join()
        optimizer._gradient_release = self  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Leaves gradients to the training loop again, those that were accumulating too."""
        if not self._members:
            return
        self._members.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for param, grad in self._kept.items():
            param.grad = grad
        self._kept.clear()
        self._optimizer._gradient_release = None  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """What the next step's gradients are clipped by, to be saved beside the optimizer's.

        Returns:
            ``{"grad_norm": ...}``.
        """
        return {"grad_norm": self.grad_norm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave: the first step after a restart is clipped by it.

        Args:
            state_dict: Of another release, or of the same one.
        """
        self.grad_norm = state_dict["grad_norm"]

    def _join(self) -> None:
        """Takes parameters in that are new to the optimizer."""
        number = 0
        for index, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                if param not in self._members:
                    own = _OwnOptimizer(self._optimizer, index, param, number)
                    self._members[param] = own
                    if param.is_floating_point() or param.is_complex():
                        self._handles.append(_hook(param, self._release))
                number += 1

    @torch.no_grad()
    def _release(self, param: Tensor) -> None:
        """Takes a gradient that is complete as far as this backward pass goes."""
        grad, param.grad = param.grad, None
        if grad is None:
            raise RuntimeError(
                f"another hook took the gradient of a parameter of shape {list(param.shape)}: "
                "is it one of another optimizer's GradientRelease?"
            )
        with self._lock:
            if self._awaited() is None:
                self._begin()
        kept = self._kept.pop(param, None)
        if kept is not None:
            grad = kept.add_(grad)
        if self._passes < self._accumulation_steps:
            self._kept[param] = grad
        elif param in self._stepped:
            raise RuntimeError(
                f"two parts of one backward pass step a parameter of shape {list(param.shape)}: "
                "reentrant checkpoints share it"
            )
        else:
            self._step(param, grad)

    def _awaited(self) -> Callable[[], None] | None:
        """The end of the pass that is under way."""
        return None if self._end_of_pass is None else self._end_of_pass()

    def _begin(self) -> None:
        """At the first gradient of a backward pass."""
        optimizer = self._optimizer
        _refuse_own_clipping(optimizer)
        if isinstance(optimizer, FusedOptimizer):
            optimizer._check_mode()
            if optimizer.ema_decay is not None:
                optimizer._averages_began = not averages_begin(optimizer)
        if self._end_of_pass is not None:  # the last one raised
            self._passes = 0
            self._kept.clear()
        self._passes += 1
        self._stepped.clear()
        self._squares.clear()
        self._coefficient = 1.0
        if self._max_grad_norm is not None and self.grad_norm is not None:
            norm = float(self.grad_norm)
            if math.isfinite(norm):
                self._coefficient = float(clip_coefficient(self._max_grad_norm, norm))
        end = self._end
        self._end_of_pass = weakref.ref(end)
        _call_at_end(end)

    def _step(self, param: Tensor, grad: Tensor | None) -> None:
        if grad is not None and self._max_grad_norm is not None:
            self._squares.append(torch.linalg.vector_norm(grad, dtype=torch.float64).square())
            if self._coefficient != 1:
                grad.mul_(self._coefficient)
        self._stepped.add(param)
        param.grad = grad
        try:
            self._members[param].step()
        finally:
            param.grad = None

    @torch.no_grad()
    def _end(self) -> None:
        """At the end of a backward pass."""
        node = torch._C._current_autograd_node()
        if node is not None:  # of a part only, a reentrant checkpoint's, inside the whole one
            end = self._awaited()
            assert end is not None
            _call_at_end_of_outer(node, end)
            return
        self._join()
        for param in list(self._members):
            if param.grad is not None:
                self._release(param)
        if self._passes == self._accumulation_steps:
            self._complete()
        self._end_of_pass = None

    def _complete(self) -> None:
        """What is left of a step when its last backward pass is through."""
        optimizer = self._optimizer
        averages = getattr(optimizer, "ema_decay", None) is not None  # they move nevertheless
        for param in self._members:
            if param not in self._stepped and (averages or param in self._kept):
                self._step(param, self._kept.pop(param, None))
        if isinstance(optimizer, FusedOptimizer):
            optimizer._count_step()
            optimizer._averages_began = averages
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look at it
        if self._squares:
            first = self._squares[0].device
            squares = torch.stack([square.to(first) for square in self._squares])
            self.grad_norm = squares.sum().sqrt()
        self._passes = 0


class _OwnOptimizer:
    """An optimizer like another one, of one of its parameters, whose state it shares."""

    def __init__(self, whole: Optimizer, group: int, param: Tensor, number: int) -> None:
        self._whole, self._group, self._param = whole, group, param
        self._own = object.__new__(type(whole))
        self._attributes: dict[str, Any] = {
            "state": defaultdict(dict),
            "_plan": None,
            "_first_number": number,
            "_gradient_release": None,
            "_optimizer_step_pre_hooks": {},
            "_optimizer_step_post_hooks": {},
        }

    def step(self) -> None:
        """With the options and the numbers that the whole optimizer has now."""
        whole, own, param, attributes = self._whole, self._own, self._param, self._attributes
        kept = whole.state.get(param)
        if attributes["state"].get(param) is not kept:  # the first step, or a checkpoint was loaded
            attributes["state"] = defaultdict(dict, {} if kept is None else {param: kept})
        own.__class__ = type(whole)  # from_torch and to_torch may have changed it
        vars(own).clear()
        vars(own).update(vars(whole))
        vars(own).update(attributes)
        own.param_groups = [{**whole.param_groups[self._group], "params": [param]}]
        type(whole).step(own)
        attributes["_plan"] = vars(own)["_plan"]
        if kept is None and param in own.state:
            whole.state[param] = own.state[param]
        if getattr(own, "_has_coded", False):
            whole._has_coded = True  # type: ignore[attr-defined]


def _refuse_closure(optimizer: Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        name = type(optimizer).__name__
        raise ValueError(f"{name} needs a closure: it cannot step one parameter at a time")


def _refuse_own_clipping(optimizer: Optimizer) -> None:
    if getattr(optimizer, "max_grad_norm", None) is not None:
        raise ValueError("optimizer.max_grad_norm must be None: give it to GradientRelease")


def _hook(param: Tensor, release: Callable[[Tensor], None]) -> RemovableHandle:
    """Has a method called with each gradient, also of a parameter that is frozen for now.

    The hook keeps nothing alive: the garbage collector does not look into a tensor's hooks.
    """
    method = weakref.WeakMethod(release)

    def hook(param: Tensor) -> None:
        alive = method()
        if alive is not None:
            alive(param)

    requires_grad = param.requires_grad
    param.requires_grad_(True)
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(requires_grad)
    return handle


def _call_at_end(end: Callable[[], None]) -> None:
    """Of the backward pass that this thread is in."""
    torch.autograd.Variable._execution_engine.queue_callback(end)


def _call_at_end_of_outer(node: Any, end: Callable[[], None]) -> None:
    """Of the backward pass that evaluates the node now."""

    def pass_on(*_: Any) -> None:
        handle.remove()
        _call_at_end(end)

    handle = node.register_hook(pass_on)

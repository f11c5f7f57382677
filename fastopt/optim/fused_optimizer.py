"""What every front of ``fastopt.optim`` shares: the step, the plan, the choice of a backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from fastopt.backends.contract import ParamGroup, UpdateRule, WeightDecay
from fastopt.backends.registry import check_name
from fastopt.backends.stock import TorchPlan
from fastopt.ops.optimizer_step import optimizer_step, step_is_skipped, unscale_gradients


def observed(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a step as torch wraps every optimizer's, but pays for it only where somebody looks.

    Torch's wrapper runs the hooks and opens a profiler range: half the time of a small step.
    Hooks see what they would see in stock's default step: unscaled gradients, and no step that a
    gradient scaler skips.
    """
    torchs_wrapper = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        if not torch.compiler.is_compiling() and (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ):
            if step_is_skipped(self):
                return step(*args, **kwargs)
            unscale_gradients(self)
            return torchs_wrapper(*args, **kwargs)
        return step(*args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch would wrap it once more
    return wrapper


class FusedOptimizer(Optimizer):
    """Mixed in before a class of ``torch.optim``: constructor and state are torch's, the step ours.

    A subclass says what its rule is. Whatever the kernels do not take goes to torch's functional
    form of the same optimizer.
    """

    # Read by torch.amp.GradScaler, which then leaves unscaling and skipping to step().
    _step_supports_amp_scaling = True
    _backend: str | None = None
    _plan: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A step that is overridden may look at gradients: a scaler has to unscale them before."""
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls):
            cls._step_supports_amp_scaling = False

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        """The row of ``csrc/core/update_rules.h`` that a group runs, with its present numbers."""
        raise TypeError(f"{type(self).__name__} has to define _update_rule")

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        """The keys of the state tensors, in the order of the rule's slots."""
        raise TypeError(f"{type(self).__name__} has to define _state_keys")

    def _prepare(self, group: ParamGroup) -> None:
        """Runs stock's checks of the gradients and makes the state that stock makes lazily."""

    def _torch_step(self, group: ParamGroup) -> None:
        """Steps the group's parameters, which all have gradients, with torch's own code."""
        raise TypeError(f"{type(self).__name__} has to define _torch_step")

    def _choose_backend(self, name: str | None) -> None:
        """Takes the constructor's ``backend``.

        Raises:
            ValueError: No backend is called so.
        """
        self._backend = None if name is None else check_name(name)

    @observed
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs a single optimization step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: The backend that was named does not take a parameter; see
                ``fastopt.explain``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            everything = [[True] * len(group["params"]) for group in self.param_groups]
            TorchPlan(self, everything).run(self, (), 1.0)
        else:
            optimizer_step(self)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """Torch's, with the choice of a backend."""
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch's; what was planned for the old state is dropped."""
        super().__setstate__(state)
        self._plan = None


def scalar(value: float | Tensor) -> float:
    """A hyperparameter, which may be a tensor of one element, as a number."""
    return value if type(value) is float else float(value)


def weight_decay_of(group: ParamGroup, decoupled: bool) -> tuple[WeightDecay, float]:
    """The kind of decay and its factor; without decay the kind that costs nothing."""
    weight_decay = scalar(group["weight_decay"])
    if decoupled or weight_decay == 0:
        return WeightDecay.DECOUPLED, 1 - scalar(group["lr"]) * weight_decay
    return WeightDecay.L2, weight_decay

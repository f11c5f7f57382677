"""What every front of ``fastopt.optim`` shares: the step, the plan, the choice of a backend."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from fastopt.backends.contract import AVERAGE, ParamGroup, UpdateRule, WeightDecay
from fastopt.backends.planning import scalar
from fastopt.backends.registry import check_name
from fastopt.ops.optimizer_step import (
    optimizer_step,
    step_is_skipped,
    traced_step,
    unscale_gradients,
)


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, and attributes that may be changed between steps.

    The gradients of a step are unscaled, clipped by norm, then by value; parameters are updated,
    gradients zeroed, averages moved: in one pass over memory, after one that measures the norm.

    Attributes:
        max_grad_norm: Clip the gradients of all groups together to this norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does. The norm before clipping is
            ``optimizer.grad_norm`` afterwards.
        norm_type: Order of that norm.
        error_if_nonfinite: Raise, and change nothing, where that norm is infinite or NaN.
        clip_value: Clip each element of the gradients to ``[-clip_value, clip_value]``; real and
            imaginary parts each.
        zero_grad_after_step: Fill the gradients with zeros once they have been used.
        ema_decay: Keep an exponential moving average of each parameter, as
            :class:`torch.optim.swa_utils.AveragedModel` with ``get_ema_multi_avg_fn(ema_decay)``
            updated after each step. It is the parameter's state ``"ema"``.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton``, ``torch`` or ``reference``; None leaves it
            to :func:`fastopt.use_backend` and ``FASTOPT_BACKEND``.
    """

    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_value: float | None
    zero_grad_after_step: bool
    ema_decay: float | None
    backend: str | None


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
    _plan: Any = None
    _in_average = False
    _averages_began = False

    # Options, with their defaults.
    max_grad_norm: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    clip_value: float | None = None
    zero_grad_after_step: bool = False
    ema_decay: float | None = None
    _backend: str | None = None

    grad_norm: Tensor | None = None
    """The norm of the last step's gradients before clipping, where ``max_grad_norm`` is set."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A step that is overridden may look at gradients: a scaler has to unscale them before."""
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls):
            cls._step_supports_amp_scaling = False
        if "__init__" in vars(cls):
            cls.__signature__ = _with_options(cls)  # type: ignore[attr-defined]

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

    def _take_options(self, options: Options) -> None:
        """Takes the constructor's keywords of ``Options``.

        Raises:
            TypeError: There is no such option.
            ValueError: A value is out of range, or no backend is called so.
        """
        for name, value in options.items():
            if name not in Options.__annotations__:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}"
                )
            setattr(self, "_backend" if name == "backend" else name, value)
        if self._backend is not None:
            check_name(self._backend)
        for name in ("max_grad_norm", "clip_value"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"Invalid {name} value: {value}")
        self.norm_type = float(self.norm_type)
        if math.isnan(self.norm_type):
            raise ValueError(f"Invalid norm_type value: {self.norm_type}")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise ValueError(
                f"Invalid decay value {self.ema_decay} provided. "
                "Please provide a value in [0,1] range."
            )

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
        self._refuse_inside_average("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaled = any(getattr(self, name, None) is not None for name in ("grad_scale", "found_inf"))
        if torch.compiler.is_compiling() and not scaled:
            traced_step(self)
        else:
            optimizer_step(self)
        return loss

    def ema_parameters(self) -> list[Tensor]:
        """The averages, in the order of the parameters in their groups.

        A parameter that has not been stepped yet stands for its own average.

        Raises:
            RuntimeError: The optimizer keeps no averages.
        """
        self._refuse_inside_average("ema_parameters()")
        if self.ema_decay is None:
            raise RuntimeError("no averages are kept: ema_decay is None")
        params = [param for group in self.param_groups for param in group["params"]]
        return [self.state.get(param, {}).get(AVERAGE, param.detach()) for param in params]

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Exchanges parameters and averages for the time of a ``with`` block, for evaluation.

        Raises:
            RuntimeError: The optimizer keeps no averages, or the block is open already.
        """
        averages = self.ema_parameters()
        params = [param for group in self.param_groups for param in group["params"]]
        pairs = {
            id(param): (param, average)
            for param, average in zip(params, averages, strict=True)
            if AVERAGE in self.state.get(param, {})
        }
        exchanged: list[tuple[Tensor, Tensor]] = []
        try:
            for pair in pairs.values():
                _exchange(*pair)
                exchanged.append(pair)
            self._in_average = True
            yield
        finally:
            self._in_average = False
            for pair in reversed(exchanged):  # of parameters that share memory, the last one first
                _exchange(*pair)

    def _refuse_inside_average(self, what: str) -> None:
        if self._in_average:
            raise RuntimeError(
                f"{what} inside average_parameters(), where parameters are exchanged for averages"
            )

    def state_dict(self) -> dict[str, Any]:
        """Torch's.

        Raises:
            RuntimeError: Inside ``average_parameters()``.
        """
        self._refuse_inside_average("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's.

        Raises:
            RuntimeError: Inside ``average_parameters()``. Besides, what torch raises.
        """
        self._refuse_inside_average("load_state_dict()")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Torch's, with the options."""
        self._refuse_inside_average("a copy")
        own = {name: value for name, value in vars(self).items() if name in _KEPT}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch's; what was planned for the old state is dropped."""
        super().__setstate__(state)
        self._plan = None


_KEPT = ({*Options.__annotations__} - {"backend"}) | {"_backend", "_averages_began"}


def _with_options(cls: type[FusedOptimizer]) -> inspect.Signature:
    """The constructor's signature with each option by its name, for ``help`` and editors."""
    signature = inspect.signature(cls.__init__)
    own = list(signature.parameters.values())[1:]
    named = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    if len(named) < len(own):
        for name, annotation in Options.__annotations__.items():
            default = getattr(FusedOptimizer, "_backend" if name == "backend" else name)
            kind = inspect.Parameter.KEYWORD_ONLY
            named.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    return signature.replace(parameters=named)


@torch.no_grad()
def _exchange(left: Tensor, right: Tensor) -> None:
    kept = left.detach().clone()
    left.copy_(right)
    right.copy_(kept)


def weight_decay_of(group: ParamGroup, decoupled: bool) -> tuple[WeightDecay, float | Tensor]:
    """The kind of decay and its factor; without decay the kind that costs nothing."""
    weight_decay = float(group["weight_decay"])
    if decoupled or weight_decay == 0:
        return WeightDecay.DECOUPLED, 1 - scalar(group["lr"]) * weight_decay
    return WeightDecay.L2, weight_decay

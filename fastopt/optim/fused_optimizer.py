"""What every front of ``fastopt.optim`` shares: the step, the plan, the choice of a backend."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from fastopt.backends.contract import AVERAGE, PRODUCT, ParamGroup, UpdateRule, WeightDecay
from fastopt.backends.planning import scalar
from fastopt.backends.registry import check_name
from fastopt.backends.state_codes import (
    STORAGE_OPTIONS,
    StateCoding,
    coded_keys,
    coding_of,
    is_coded,
)
from fastopt.ops.arguments import is_scalar
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
            updated after each step. It is the parameter's state ``"ema"``, in the parameter's
            dtype: in bf16 a decay near 1 moves nothing.
        state_storage: Of SGD, Adam, AdamW and Lion, how moments are stored: ``"bf16"``, ``"8bit"``
            (a byte each, and a scale for every 256, which a NaN spoils), ``"fp32"``, or None: in
            the parameter's dtype, beside masters in fp32. Parameters in double precision, complex
            ones and those that do not fill their memory keep theirs. A parameter group may have a
            ``"state_storage"`` of its own.
        param_precision: Of the same, what bf16 parameters are beside their 16 bits:
            ``"stochastic"``, rounded up or down by chance so that the mean is kept; ``"kahan"``,
            16 bits more of state that make up for most of the rounding; ``"master"``, 16 bits that
            make an exact fp32 number of each. A parameter group may have one of its own.
        min_8bit_size: Parameters with fewer elements have fp32 moments instead of 8 bits.
        rounding_seed: Of the numbers that rounding draws; with the number of a parameter and its
            step they are the same for any number of threads, and after a restart.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton``, ``torch`` or ``reference``; None leaves it
            to :func:`fastopt.use_backend` and ``FASTOPT_BACKEND``.
    """

    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_value: float | None
    zero_grad_after_step: bool
    ema_decay: float | None
    state_storage: str | None
    param_precision: str | None
    min_8bit_size: int
    rounding_seed: int
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
    """An optimizer whose step runs on kernels.

    A subclass says what its rule is, and spells it in torch's operations for whatever the kernels
    do not take; ``TorchTwin`` has those that torch has.
    """

    # Read by torch.amp.GradScaler, which then leaves unscaling and skipping to step().
    _step_supports_amp_scaling = True
    _plan: Any = None
    _in_average = False
    _averages_began = False
    _first_number = 0  # of its parameters, which rounding draws by
    _gradient_release: Any = None  # which takes the steps, in the backward pass

    # Options, with their defaults.
    max_grad_norm: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    clip_value: float | None = None
    zero_grad_after_step: bool = False
    ema_decay: float | None = None
    # Whether moments may be stored otherwise than in the parameter's dtype.
    _stores_state = False
    _has_coded = False
    state_storage: str | None = None
    param_precision: str | None = None
    min_8bit_size: int = 4096
    rounding_seed: int = 0
    _backend: str | None = None
    _loading: dict[str, Any] | None = None

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
        """Checks the gradients. Of torch's optimizers, see ``TorchTwin``, also makes state."""
        if any(param.grad is not None and param.grad.is_sparse for param in group["params"]):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _new_state(self, key: str, param: Tensor) -> Tensor:
        """What a state tensor is before the first step."""
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def _torch_step(self, group: ParamGroup) -> None:
        """Steps the group's parameters, which all have gradients, in torch's operations."""
        self._prepare(group)
        keys = self._state_keys(group)
        for param in group["params"]:
            state = self.state[param]
            for key in keys:
                if key not in state:
                    state[key] = self._new_state(key, param)
            counter = [state["step"]] if "step" in state else []
            tensors = (param, param.grad, *counter, *(state[key] for key in keys))
            self._torch_update(group, *(_real(tensor) for tensor in tensors))

    def _torch_update(self, group: ParamGroup, param: Tensor, grad: Tensor, *slots: Tensor) -> None:
        """The rule in torch's operations, in place, on real tensors.

        Before the slots comes the state ``step``, where there is one.
        """
        raise TypeError(f"{type(self).__name__} has to define _torch_update")

    def _count_step(self) -> None:
        """Counts, in the groups, a step that took place."""

    def _check_mode(self) -> None:
        """Raises where no step can be taken now."""
        self._refuse_inside_average("step()")

    def _coding(self, group: ParamGroup, param: Tensor) -> StateCoding | None:
        """How a parameter's state is stored; None: in the parameter's dtype."""
        if not self._stores_state:
            return None
        storage, precision = (group.get(name, getattr(self, name)) for name in STORAGE_OPTIONS)
        if storage is None and precision is None:
            return None
        slots = len(self._state_keys(group))
        return coding_of(param, slots, storage, precision, self.min_8bit_size)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's.

        Raises:
            TypeError: The group has an option of how state is stored, and this optimizer has none.
            ValueError: There is no storage or precision of the name.
        """
        named = {name: param_group[name] for name in STORAGE_OPTIONS if name in param_group}
        if named and not self._stores_state:
            raise TypeError(
                f"a parameter group of {type(self).__name__} has no {next(iter(named))!r}"
            )
        storage, precision = (named.get(name) for name in STORAGE_OPTIONS)
        coding_of(torch.empty(0), 0, storage, precision, 0)
        super().add_param_group(param_group)

    def _take_options(self, options: Options) -> None:
        """Takes the constructor's keywords of ``Options``.

        Raises:
            TypeError: There is no such option.
            ValueError: A value is out of range, or no backend is called so.
        """
        taken = _options_of(type(self))
        for name, value in options.items():
            if name not in taken:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}"
                )
            setattr(self, "_backend" if name == "backend" else name, value)
        if self._backend is not None:
            check_name(self._backend)
        # Raises where there is no storage or precision of the name.
        coding_of(torch.empty(0), 0, self.state_storage, self.param_precision, 0)
        for name in ("min_8bit_size", "rounding_seed"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"Invalid {name} value: {value!r}")
        for name in ("error_if_nonfinite", "zero_grad_after_step"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"Invalid {name} value: {value!r}")
        for name in ("max_grad_norm", "clip_value"):
            value = getattr(self, name)
            if value is not None and not (is_scalar(value) and value >= 0):
                raise ValueError(f"Invalid {name} value: {value!r}")
        order: Any = self.norm_type  # "inf" too, as in torch
        if not (is_scalar(order) or order == "inf") or math.isnan(float(order)):
            raise ValueError(f"Invalid norm_type value: {order!r}")
        self.norm_type = float(order)
        decay = self.ema_decay
        if decay is not None and not (is_scalar(decay) and 0 <= decay <= 1):
            raise ValueError(
                f"Invalid decay value {decay!r} provided. Please provide a value in [0,1] range."
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
        self._check_mode()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._gradient_release is not None:
            return loss
        scaled = any(getattr(self, name, None) is not None for name in ("grad_scale", "found_inf"))
        if torch.compiler.is_compiling() and not scaled:
            traced_step(self)
        else:
            optimizer_step(self)
        return loss

    def ema_parameters(self) -> list[Tensor]:
        """The averages, in the order of the parameters in their groups.

        A parameter that has not been stepped yet stands for its own average.

        Returns:
            The tensors of the state, not copies.

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
        """Torch's; state in 8 bits is bytes, which torch's own optimizers would take for numbers.

        Returns:
            Groups and state, as torch has them.

        Raises:
            RuntimeError: Inside ``average_parameters()``.
        """
        self._refuse_inside_average("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, but for state that is not stored in its parameter's dtype, which stays exact.

        State that was stored otherwise than this optimizer stores it is converted at the next step.
        Where anything is raised, groups and state are those from before.

        Args:
            state_dict: What ``state_dict`` gave, of this optimizer or of torch's.

        Raises:
            RuntimeError: Inside ``average_parameters()``. Besides, what torch raises.
            ValueError: The state is another optimizer's, or that of parameters of other shapes.
        """
        self._refuse_inside_average("load_state_dict()")

        def remember(_: Optimizer, state_dict: dict[str, Any]) -> None:
            self._check_saved(state_dict)
            self._loading = state_dict

        own = [{name: g[name] for name in STORAGE_OPTIONS if name in g} for g in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(remember)  # after those of the user
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            vars(self).update(before)
            raise
        finally:
            handle.remove()
            self._loading = None
        for group, options in zip(self.param_groups, own, strict=True):
            for name, value in options.items():  # which a checkpoint of torch's groups has not got
                group.setdefault(name, value)

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        """Refuses what another optimizer has saved, or one of other parameters.

        What is no state dictionary is left for torch to refuse.
        """
        whose = f"the state is not that of {type(self).__name__}"
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            # Modes that older checkpoints may lack.
            modes = {k: v for k, v in group.items() if v is None or isinstance(v, bool)}
            try:
                self._update_rule({**modes, **saved_group})
                keys = self._state_keys({**modes, **saved_group})
            except KeyError as error:
                raise ValueError(f"{whose}: its groups have no {error}") from None
            known = {*coded_keys(keys), "step", PRODUCT, AVERAGE}
            for param, number in zip(group["params"], saved_group["params"], strict=False):
                saved = state_dict["state"].get(number, {})
                missing = [key for key in keys if key not in saved]
                is_part = len(missing) < len(keys) or "step" in saved
                if missing and (not known.issuperset(saved) or (is_part and not is_coded(saved))):
                    raise ValueError(f"{whose}: parameter {number} has {[*saved]}, no {missing}")
                for key in keys:
                    value = saved.get(key)
                    shape = value.shape if isinstance(value, Tensor) else value
                    if shape is not None and shape != param.shape:
                        raise ValueError(
                            f"state {key!r} of parameter {number} must have its shape "
                            f"{tuple(param.shape)}, got {shape!r}"
                        )

    def __getstate__(self) -> dict[str, Any]:
        """Torch's, with the options."""
        self._refuse_inside_average("a copy")
        own = {name: value for name, value in vars(self).items() if name in _KEPT}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch's; what was planned for the old state is dropped."""
        super().__setstate__(state)
        self._plan = None
        if self._loading is not None:  # the hooks of the user come after this
            self._averages_began = False
            self._restore_coded_state(self._loading)

    def _restore_coded_state(self, state_dict: dict[str, Any]) -> None:
        """Takes state as it was saved where torch has cast it to the parameter's dtype."""
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            keys = self._state_keys(group)
            for param, number in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(number, {})
                if self._coding(group, param) is None and not is_coded(saved):
                    continue
                self._has_coded = True
                for key in coded_keys(keys):
                    if isinstance(saved.get(key), Tensor):
                        self.state[param][key] = saved[key].to(param.device)


_OF_STORAGE = (*STORAGE_OPTIONS, "min_8bit_size", "rounding_seed")
_KEPT = ({*Options.__annotations__} - {"backend"}) | {"_backend", "_averages_began", "_has_coded"}
# Of an instance; what else it has is torch's.
OWN_ATTRIBUTES = _KEPT | {"_plan", "_loading", "_in_average", "grad_norm"}


def _options_of(cls: type[FusedOptimizer]) -> dict[str, Any]:
    """The options that a class takes, with their annotations."""
    there = dict(Options.__annotations__)
    if not cls._stores_state:
        for name in _OF_STORAGE:
            del there[name]
    return there


def _with_options(cls: type[FusedOptimizer]) -> inspect.Signature:
    """The constructor's signature with each option by its name, for ``help`` and editors."""
    signature = inspect.signature(cls.__init__)
    own = list(signature.parameters.values())[1:]
    named = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    if len(named) < len(own):
        for name, annotation in _options_of(cls).items():
            default = getattr(cls, "_backend" if name == "backend" else name)
            kind = inspect.Parameter.KEYWORD_ONLY
            named.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    return signature.replace(parameters=named)


@torch.no_grad()
def _exchange(left: Tensor, right: Tensor) -> None:
    kept = left.detach().clone()
    left.copy_(right)
    right.copy_(kept)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_hyperparameters(
    lr: float | Tensor, betas: tuple[float, float], weight_decay: float, eps: float = 0
) -> None:
    """Torch's checks, in its words, for an optimizer that torch has not got.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not (is_scalar(lr) and lr >= 0):
        raise ValueError(f"Invalid learning rate: {lr!r}")
    if not (is_scalar(eps) and eps >= 0):
        raise ValueError(f"Invalid epsilon value: {eps!r}")
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        if not (is_scalar(beta) and 0 <= beta < 1):
            raise ValueError(f"Invalid beta parameter at index {index}: {beta!r}")
    if not (is_scalar(weight_decay) and weight_decay >= 0):
        raise ValueError(f"Invalid weight_decay value: {weight_decay!r}")


def weight_decay_of(group: ParamGroup, decoupled: bool) -> tuple[WeightDecay, float | Tensor]:
    """The kind of decay and its factor; without decay the kind that costs nothing."""
    weight_decay = float(group["weight_decay"])
    if decoupled or weight_decay == 0:
        return WeightDecay.DECOUPLED, 1 - scalar(group["lr"]) * weight_decay
    return WeightDecay.L2, weight_decay

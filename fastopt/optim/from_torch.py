"""``from_torch`` and ``to_torch``: a running optimizer of torch's becomes ours, and back."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import Unpack

from fastopt.backends.planning import counter_device
from fastopt.backends.spread_state import bring_to
from fastopt.optim.adagrad import Adagrad
from fastopt.optim.adam import Adam
from fastopt.optim.adamax import Adamax
from fastopt.optim.adamw import AdamW
from fastopt.optim.fused_optimizer import OWN_ATTRIBUTES, FusedOptimizer, Options
from fastopt.optim.muon import Muon
from fastopt.optim.nadam import NAdam
from fastopt.optim.radam import RAdam
from fastopt.optim.rmsprop import RMSprop
from fastopt.optim.sgd import SGD

FRONTS: dict[type[Optimizer], type[FusedOptimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.Adagrad: Adagrad,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adamax: Adamax,
    torch.optim.RAdam: RAdam,
    torch.optim.NAdam: NAdam,
    torch.optim.Muon: Muon,
}


def from_torch(optimizer: Optimizer, **options: Unpack[Options]) -> FusedOptimizer:
    """Makes an optimizer of ``torch.optim`` fastopt's, in place and in the middle of a run.

    Only its class changes, and options are added: groups, state, hooks, schedulers and gradient
    scalers stay with it. Its next step is the one that fastopt's would take in its place.

    Args:
        optimizer: A ``torch.optim`` ``SGD``, ``Adam``, ``AdamW``, ``Adagrad``, ``RMSprop``,
            ``Adamax``, ``RAdam``, ``NAdam`` or ``Muon``, or one that is fastopt's already.
        options: What surrounds the update, and the backend; see :class:`fastopt.optim.Options`.

    Returns:
        The same object.

    Raises:
        TypeError: It is another optimizer, or one derived from these, or has a ``step`` of its own;
            there is no such option.
        ValueError: An option is out of range.
    """
    cls = FRONTS.get(type(optimizer))
    if isinstance(optimizer, FusedOptimizer):
        cls = type(optimizer)
    if cls is None:
        raise TypeError(
            f"from_torch takes {', '.join(stock.__name__ for stock in FRONTS)} of torch.optim, "
            f"got {_name(optimizer)}"
        )
    _check_step(optimizer)
    changed = cls.__new__(cls)
    vars(changed).update(vars(optimizer))
    changed._take_options(options)
    vars(optimizer).update(vars(changed))
    _change_class(optimizer, cls)
    assert isinstance(optimizer, FusedOptimizer)
    return optimizer


def to_torch(optimizer: FusedOptimizer) -> Optimizer:
    """Makes an optimizer of fastopt's torch's, in place: what ``from_torch`` did is undone.

    Options are dropped. Moments in 8 bits or bf16 are brought to their parameter's dtype, and what
    bf16 parameters had beside their 16 bits is lost; averages stay in the state, unused.

    Args:
        optimizer: One of those that ``from_torch`` makes.

    Returns:
        The same object.

    Raises:
        TypeError: Torch has no such optimizer, or it has a ``step`` of its own.
        ValueError: Its momentum is classical, which torch's is not.
        RuntimeError: Inside ``average_parameters()``.
    """
    twins = {front: stock for stock, front in FRONTS.items()}
    if type(optimizer) in FRONTS:
        raise TypeError(f"{_name(optimizer)} is torch's own: there is nothing to change")
    if type(optimizer) not in twins:
        raise TypeError(f"torch.optim has no twin of {_name(optimizer)}")
    if any(group.get("classical_momentum") for group in optimizer.param_groups):
        raise ValueError("torch.optim.SGD has no classical_momentum")
    optimizer._refuse_inside_average("to_torch()")
    _check_step(optimizer)
    if optimizer._has_coded:
        for group in optimizer.param_groups:
            keys, rule = optimizer._state_keys(group), optimizer._update_rule(group).name
            for param in group["params"]:
                state = optimizer.state.get(param, {})
                bring_to(state, keys, param, None, rule, counter_device(group, param))
    for name in OWN_ATTRIBUTES:
        vars(optimizer).pop(name, None)
    _change_class(optimizer, twins[type(optimizer)])
    return optimizer


def _check_step(optimizer: Optimizer) -> None:
    """Refuses an optimizer whose step is not that of its class, nor a scheduler's wrapper of it."""
    step = vars(optimizer).get("step")
    if step is None:
        return
    wrapped = getattr(step, "__wrapped__", None)
    if not hasattr(step, "_wrapped_by_lr_sched") or wrapped is not type(optimizer).step:
        raise TypeError(f"the step of this {_name(optimizer)} was replaced")


def _change_class(optimizer: Optimizer, cls: type[Optimizer]) -> None:
    optimizer.__class__ = cls
    if "step" in vars(optimizer):
        optimizer.step = _scheduled(optimizer)  # type: ignore[method-assign]


def _scheduled(optimizer: Optimizer) -> Any:
    """The step of the class as schedulers wrap it, to warn where they run before it."""
    step: Any = type(optimizer).step
    reference = weakref.ref(optimizer)  # no cycle: state is freed with the last reference

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        stepped = reference()
        stepped._opt_called = True  # type: ignore[union-attr]
        return step(stepped, *args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return wrapper


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"

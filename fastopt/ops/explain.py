"""Says which backend does what, and why not a faster one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from fastopt.backends import registry
from fastopt.backends.contract import SteppedOptimizer
from fastopt.ops.optimizer_step import requests


@dataclass(frozen=True, slots=True)
class ExplainedParameter:
    """The choice for one parameter.

    Attributes:
        group: Index of the parameter group.
        index: Index in the group.
        name: The parameter's name, where the optimizer was given named parameters, or "".
        shape: Its shape.
        dtype: Its dtype, as ``torch.float32`` is printed.
        device: Its device.
        backend: The backend that steps it, or None where the one that was named cannot.
        reasons: For each backend that was asked before, why it does not.
    """

    group: int
    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    backend: str | None
    reasons: dict[str, str]


@dataclass(frozen=True, slots=True)
class ExplainedCall:
    """The choice for one call of an operator.

    Attributes:
        task: The work in words, with shape, dtype and device.
        backend: The backend that did it.
        reasons: For each backend that was asked before, why it did not.
    """

    task: str
    backend: str
    reasons: dict[str, str]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every choice, for parameters of an optimizer or operators in a call; ``print`` shows them."""

    requested: str
    parameters: tuple[ExplainedParameter, ...] = ()
    calls: tuple[ExplainedCall, ...] = ()

    def __str__(self) -> str:
        """A line for each parameter or call."""
        lines = [f"backend requested: {self.requested}"]
        for p in self.parameters:
            place = f"group {p.group}, parameter {p.index}" + (f" ({p.name})" if p.name else "")
            what = f"{place}, {list(p.shape)} {p.dtype} on {p.device}"
            lines.append(f"{what}: {_outcome(p.backend, p.reasons)}")
        lines += [f"{call.task}: {_outcome(call.backend, call.reasons)}" for call in self.calls]
        if len(lines) == 1:
            lines.append("none of fastopt's operators ran, or only as part of compiled code")
        return "\n".join(lines)


def _outcome(backend: str | None, reasons: dict[str, str]) -> str:
    return (backend or "no backend") + "".join(
        f"; not {name}: {reason}" for name, reason in reasons.items()
    )


def explain(what: SteppedOptimizer | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend does what, and why not a faster one.

    Args:
        what: An optimizer of ``fastopt.optim``: which backend would step each parameter now, given
            its gradient as it is now. Or a module or function: it is called, with all that a call
            changes, and each of fastopt's operators that it runs is a line.
        args: Of the call.
        kwargs: Of the call.

    Returns:
        A choice for each parameter, or for each call of an operator.

    Raises:
        TypeError: ``what`` is neither; or an optimizer, and there are arguments.
    """
    if hasattr(what, "_update_rule"):
        if args or kwargs:
            raise TypeError("explain takes no further arguments with an optimizer")
        return _explain_optimizer(cast(SteppedOptimizer, what))
    if not callable(what):
        raise TypeError(
            f"what must be an optimizer of fastopt.optim or something to call, got "
            f"{type(what).__name__}"
        )
    with registry.watched() as choices:
        what(*args, **kwargs)
    calls = [
        ExplainedCall(choice.request.task, choice.backend, choice.reasons)
        for choice in choices
        if choice.backend is not None
    ]
    return Explanation(registry.requested(None), calls=tuple(calls))


def _explain_optimizer(optimizer: SteppedOptimizer) -> Explanation:
    requested = registry.requested(optimizer._backend)
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", [""] * len(group["params"]))
        rule = optimizer._update_rule(group)
        for index, request in enumerate(requests(optimizer, group, rule, with_gradients=True)):
            choice = registry.answers(request, requested)
            param = request.param
            rows.append(
                ExplainedParameter(
                    group=number,
                    index=index,
                    name=names[index] if index < len(names) else "",
                    shape=tuple(param.shape),
                    dtype=str(param.dtype),
                    device=str(param.device),
                    backend=choice.backend,
                    reasons=choice.reasons,
                )
            )
    return Explanation(requested, tuple(rows))

"""Says which backend does what, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass

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
class Explanation:
    """The choice for every parameter of an optimizer; ``print`` shows it as a table."""

    requested: str
    parameters: tuple[ExplainedParameter, ...]

    def __str__(self) -> str:
        """A line for each parameter."""
        lines = [f"backend requested: {self.requested}"]
        for p in self.parameters:
            place = f"group {p.group}, parameter {p.index}" + (f" ({p.name})" if p.name else "")
            what = f"{place}, {list(p.shape)} {p.dtype} on {p.device}"
            why = "".join(f"; not {name}: {reason}" for name, reason in p.reasons.items())
            lines.append(f"{what}: {p.backend or 'no backend'}{why}")
        return "\n".join(lines)


def explain(optimizer: SteppedOptimizer) -> Explanation:
    """Says which backend would step each parameter now, given its gradient as it is now.

    Args:
        optimizer: An optimizer of ``fastopt.optim``.

    Raises:
        TypeError: ``optimizer`` is not one of fastopt's.
    """
    if not hasattr(optimizer, "_update_rule"):
        raise TypeError(f"optimizer must be one of fastopt.optim's, got {type(optimizer).__name__}")
    requested = registry.requested(optimizer._backend)
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", [""] * len(group["params"]))
        rule = optimizer._update_rule(group)
        for index, request in enumerate(requests(optimizer, group, rule, with_gradients=True)):
            answers = list(registry.candidates(request, requested))
            taken = [backend.name for backend, reason in answers if reason is None]
            reasons = {backend.name: reason for backend, reason in answers if reason is not None}
            param = request.param
            rows.append(
                ExplainedParameter(
                    group=number,
                    index=index,
                    name=names[index] if index < len(names) else "",
                    shape=tuple(param.shape),
                    dtype=str(param.dtype),
                    device=str(param.device),
                    backend=taken[0] if taken else None,
                    reasons=reasons,
                )
            )
    return Explanation(requested, tuple(rows))

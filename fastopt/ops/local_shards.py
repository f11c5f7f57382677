"""``DTensor`` parameters: each rank steps its own part, which elementwise rules allow.

``WHOLE_RULES`` are left to torch's operations, which see the whole parameter.
"""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt.backends.contract import (
    Backend,
    Created,
    OptimizerPlan,
    ParamGroup,
    Refusal,
    SteppedOptimizer,
    Tail,
    UpdateRule,
)
from fastopt.backends.plain_tensors import is_dtensor
from fastopt.backends.planning import bump_versions
from fastopt.backends.spread_state import local_of, parts_of
from fastopt.backends.state_codes import StateCoding


def plan_step(
    backend: Backend,
    optimizer: SteppedOptimizer,
    served: Sequence[Sequence[bool]],
    created: Created,
) -> list[OptimizerPlan]:
    """The plans of a backend for the parameters marked: one for each way in which they are spread.

    What all parameters of a plan have in common is how norms of their parts become one.
    """
    ways: dict[Any, list[list[bool]]] = {}
    for number, (group, marks) in enumerate(zip(optimizer.param_groups, served, strict=True)):
        for place, (param, mine) in enumerate(zip(group["params"], marks, strict=True)):
            if mine:
                native = is_dtensor(param) and backend.name != "torch"
                way = (param.device_mesh, param.placements) if native else None
                if way not in ways:
                    ways[way] = [[False] * len(row) for row in served]
                ways[way][number][place] = True
    return [
        backend.plan_optimizer_step(optimizer, marks, created)
        if way is None
        else ShardsPlan(backend, optimizer, marks, created)
        for way, marks in ways.items()
    ]


class LocalOptimizer:
    """An optimizer as if it had this rank's parts of the parameters marked, and of their state."""

    def __init__(self, optimizer: SteppedOptimizer, members: Sequence[Member]) -> None:
        self._whole = weakref.ref(optimizer)  # a plan does not keep its optimizer alive
        self.param_groups = [{**g, "params": list(g["params"])} for g in optimizer.param_groups]
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._whole_params: dict[int, Tensor] = {}
        for member in members:
            self.param_groups[member.group]["params"][member.place] = member.local
            self.state[member.local] = member.parts
            self._whole_params[id(member.local)] = member.param

    def _coding(self, group: ParamGroup, param: Tensor) -> StateCoding | None:
        """That of the whole parameter, whose size counts."""
        coding: StateCoding | None = self._whole()._coding(  # type: ignore[union-attr]
            group, self._whole_params.get(id(param), param)
        )
        return coding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole(), name)


class Member:
    """A parameter and its state, with this rank's parts of them, as they were when planned."""

    def __init__(self, optimizer: SteppedOptimizer, group: int, place: int) -> None:
        self.group, self.place = group, place
        self.param: Any = optimizer.param_groups[group]["params"][place]
        self.local: Tensor = local_of(self.param)
        state = optimizer.state.get(self.param, {})
        self.state = [(key, value, local_of(value)) for key, value in state.items()]
        self.parts = parts_of(state, self.param)

    def is_current(self, optimizer: SteppedOptimizer) -> bool:
        """Whether all tensors are the same ones still."""
        if self.param._local_tensor is not self.local:
            return False
        state = optimizer.state.get(self.param, ())
        if len(state) != len(self.state):
            return False
        for key, value, local in self.state:
            if state.get(key) is not value:
                return False
            if value is not local and value._local_tensor is not local:
                return False
        return True

    def fetch_gradient(self) -> None:
        """Gives the part of the parameter the part of the gradient, spread alike."""
        grad = self.param.grad
        if is_dtensor(grad):
            spec, own = grad._spec, self.param._spec
            if spec.placements != own.placements or spec.mesh != own.mesh:
                # As torch's operations on both would do, partial sums added up say.
                grad = self.param.grad = grad.redistribute(own.mesh, own.placements)
            grad = grad._local_tensor
            if type(grad) is not Tensor and hasattr(grad, "wait"):
                grad = grad.wait()  # of a collective that is still under way
        self.local.grad = grad


class ShardsPlan:
    """A backend's plan for this rank's parts of parameters that are spread in one way."""

    def __init__(
        self,
        backend: Backend,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> None:
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._members = [
            Member(optimizer, group, place)
            for group, marks in enumerate(served)
            for place, mine in enumerate(marks)
            if mine
        ]
        self._local: Any = LocalOptimizer(optimizer, self._members)
        made = {
            id(member.local): (member.local, created[id(member.param)][1])
            for member in self._members
            if id(member.param) in created
        }
        self._plan = backend.plan_optimizer_step(self._local, served, made)
        self._refused: set[tuple[int, int]] = set()

    def collect(self, optimizer: SteppedOptimizer, writing: bool) -> Sequence[Refusal] | None:
        """Compares the whole tensors, then has the backend compare and fetch the parts."""
        if not self._is_current(optimizer):
            return None
        for member in self._members:
            member.fetch_gradient()
        refused = self._plan.collect(self._local, writing)
        self._refused = {(refusal.group, refusal.place) for refusal in refused or ()}
        return refused

    def _is_current(self, optimizer: SteppedOptimizer) -> bool:
        groups = [group["params"] for group in optimizer.param_groups]
        if [len(params) for params in groups] != [len(params) for params in self._params]:
            return False
        pairs = zip(_chained(groups), _chained(self._params), strict=True)
        return all(itertools.starmap(operator.is_, pairs)) and all(
            member.is_current(optimizer) for member in self._members
        )

    def grad_norm(self, optimizer: SteppedOptimizer, order: float) -> float | Tensor | None:
        """Of the whole gradients: the norms of their parts, joined over the mesh."""
        norm = self._plan.grad_norm(self._local, order)
        if norm is None:  # on every rank
            return None
        first = self._members[0].param
        groups = [
            first.device_mesh.get_group(dim)
            for dim, placement in enumerate(first.placements)
            if not placement.is_replicate()
        ]
        if order == 0:
            return self._nonzero_gradients(groups)
        for group in groups:
            joined = torch.as_tensor(norm, dtype=torch.float64, device=first.device)
            norm = _joined_over(joined, order, group)
        return norm

    def _nonzero_gradients(self, groups: Sequence[Any]) -> Tensor:
        """How many gradients are not zero on all ranks, which is torch's norm of order 0."""
        nonzero = [
            member.local.grad.any()
            for member in self._members
            if member.local.grad is not None and (member.group, member.place) not in self._refused
        ]
        found = torch.stack(nonzero).double()
        for group in groups:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
        return found.sum()

    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Steps the parts, and tells autograd that the whole parameters have changed."""
        stepped = [member.param for member in self._members if member.local.grad is not None]
        self._plan.run(self._local, rules, tail)
        bump_versions(stepped)
        self._drop_gradients()

    def release(self) -> None:
        """Drops the gradients."""
        self._plan.release()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for member in self._members:
            member.local.grad = None


def _chained(rows: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(rows)


def _joined_over(norm: Tensor, order: float, group: Any) -> Tensor:
    """The norm of all parts on the ranks of a group."""
    distributed = torch.distributed
    if math.isinf(order):
        how = distributed.ReduceOp.MAX if order > 0 else distributed.ReduceOp.MIN
        distributed.all_reduce(norm, how, group)
        return norm
    power = norm**order
    distributed.all_reduce(power, group=group)
    return power ** (1 / order)

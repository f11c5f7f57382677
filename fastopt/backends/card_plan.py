"""An optimizer's steps in the memory of cards: what a plan does whoever launches the kernels."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt.backends.contract import Created, Refusal, SteppedOptimizer, Tail, UpdateRule
from fastopt.backends.cuda_context import is_capturing
from fastopt.backends.plain_tensors import DLPACK_DEVICES
from fastopt.backends.planning import (
    PlannedParameter,
    bump_versions,
    counts_on_device,
    joined_norm,
    members,
    named_refusal,
    planned_parameters,
)

Planned = Sequence[Sequence[PlannedParameter]]


class CardPlan(abc.ABC):
    """A native plan, and its memory on one card; a subclass launches.

    Args:
        native: The native module's class of plans.
        optimizer: Whose steps are planned.
        planned: Its parameters by group, those elsewhere than on the card marked so.
        device: The card.
    """

    def __init__(
        self, native: Any, optimizer: SteppedOptimizer, planned: Planned, device: torch.device
    ) -> None:
        self._device = device
        # Where the host plays the card, steps are counted where torch would count them on one.
        on_card = any(map(counts_on_device, optimizer.param_groups))
        self._native = native(
            optimizer.state,
            planned,
            DLPACK_DEVICES[device.type],
            device.index or 0,
            device.type == "cpu" and not on_card,
        )
        self._functors = self._empty(self._native.functor_bytes)
        self._upload()

    def _empty(self, size: int) -> Tensor:
        return torch.empty(max(size, 16), dtype=torch.uint8, device=self._device)

    def _upload(self) -> None:
        self._version = self._native.table_version
        self._table = self._empty(self._native.table_bytes)
        table = self._native.table(self._table.data_ptr())
        if table:
            self._table[: len(table)] = torch.frombuffer(bytearray(table), dtype=torch.uint8)

    def collect(self, optimizer: SteppedOptimizer, writing: bool) -> Sequence[Refusal] | None:
        """Fetches the gradients, and brings the table up to date where their layouts are new."""
        refused = self._native.collect(optimizer.param_groups, optimizer.state, writing)
        if refused is None:
            return None
        if self._native.table_version != self._version:
            self._upload()
        return [named_refusal(optimizer, *refusal) for refusal in refused]

    def grad_norm(self, order: float) -> Tensor | None:
        """Of what was fetched, in double precision, on the card."""
        grads = self._native.gradients()
        if not grads:
            return None
        return self._norm(grads, order)

    @abc.abstractmethod
    def _norm(self, grads: list[Tensor], order: float) -> Tensor:
        """The norm of the gradients that were fetched, one at least."""

    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Launches the kernels."""
        kept: list[Tensor] = []  # until they are launched: the allocator follows the stream

        def number(value: float | Tensor) -> float | tuple[int, bool]:
            if not isinstance(value, Tensor):
                return value
            if value.device.type == "cpu" and self._device.type != "cpu":
                return float(value)
            here = value.to(self._device)
            if here.dtype not in (torch.float32, torch.float64):
                here = here.double()
            kept.append(here)
            return here.data_ptr(), here.dtype == torch.float64

        native_rules = tuple(
            (
                rule.name,
                rule.weight_decay,
                number(rule.decay),
                rule.maximize,
                tuple(number(value) for value in rule.hyperparameters),
            )
            for rule in rules
        )
        found_inf = 0
        if tail.found_inf is not None:
            kept.append(tail.found_inf.to(self._device, torch.float32))
            found_inf = kept[-1].data_ptr()
        native_tail = (
            number(tail.grad_scale),
            tail.clip_value,
            tail.changes_gradients,
            tail.zero_grad,
            optimizer.ema_decay is not None,
            tail.average_weight,
            found_inf,
        )
        written = self._launch(native_rules, native_tail)
        if is_capturing(self._device):
            # A graph reads them at every replay, whatever becomes of this plan.
            vars(optimizer).setdefault("_read_by_graphs", []).append(self._leave_to_graph())
        bump_versions(written)

    @abc.abstractmethod
    def _launch(self, rules: tuple[Any, ...], tail: tuple[Any, ...]) -> list[Tensor]:
        """Steps what was fetched, on the current stream; returns what ``bump_versions`` takes."""

    def _read(self) -> tuple[Tensor, ...]:
        """The plan's own memory that kernels read."""
        return self._table, self._functors

    def _leave_to_graph(self) -> tuple[Tensor | None, ...]:
        """What the graph that is being captured reads."""
        return self._read()

    def _stream(self) -> int:
        """The current stream, on which the plan's memory is in use from now on."""
        if self._device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self._device)
        for tensor in self._read():
            tensor.record_stream(stream)
        return stream.cuda_stream

    def release(self) -> None:
        """Drops the gradients."""
        self._native.release()


class CardPlans:
    """The plans of all cards.

    Args:
        make: Makes the plan of one card.
        optimizer: Whose steps are planned.
        served: The parameters to be served, by group and index.
        created: As in ``Backend.plan_optimizer_step``.
    """

    def __init__(
        self,
        make: Callable[[SteppedOptimizer, Planned, torch.device], CardPlan],
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> None:
        devices = dict.fromkeys(
            param.device
            for group, marks in zip(optimizer.param_groups, served, strict=True)
            for param, mine in members(group, marks)
            if mine
        )
        self._cards = []
        for device in devices:
            here = [
                [mine and param.device == device for param, mine in members(group, marks)]
                for group, marks in zip(optimizer.param_groups, served, strict=True)
            ]
            self._cards.append(
                make(optimizer, planned_parameters(optimizer, here, created), device)
            )

    def collect(self, optimizer: SteppedOptimizer, writing: bool) -> Sequence[Refusal] | None:
        """Compares all that the plans know with the optimizer and fetches the gradients.

        Raises:
            RuntimeError: A graph is being captured, and the optimizer is not capturable.
        """
        if "capturable" in optimizer.defaults:
            # Torch's own check; it was renamed after 2.11.
            for device_kind in ("accelerator", "cuda"):
                check = getattr(optimizer, f"_{device_kind}_graph_capture_health_check", None)
                if check is not None:
                    check()
                    break
        refusals: list[Refusal] = []
        for card in self._cards:
            refused = card.collect(optimizer, writing)
            if refused is None:
                self.release()
                return None
            refusals += refused
        return refusals

    def grad_norm(self, optimizer: SteppedOptimizer, order: float) -> float | Tensor | None:
        """Stays on the card, or on the first of several."""
        norms = [norm for card in self._cards if (norm := card.grad_norm(order)) is not None]
        return joined_norm(norms, order) if norms else None

    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Launches the kernels on each card's current stream."""
        for card in self._cards:
            card.run(optimizer, rules, tail)

    def release(self) -> None:
        """Drops the gradients."""
        for card in self._cards:
            card.release()

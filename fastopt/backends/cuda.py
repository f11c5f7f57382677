"""Backend ``cuda``: the CUDA kernels of ``csrc/cuda``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import cuda_attention, cuda_linear_cross_entropy, cuda_lstm, selfcheck
from fastopt.backends.contract import (
    AttentionRequest,
    Created,
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
    Refusal,
    SteppedOptimizer,
    Tail,
    UpdateRule,
)
from fastopt.backends.cuda_context import is_capturing
from fastopt.backends.lstm_requests import refuse_lstm
from fastopt.backends.plain_tensors import DLPACK_DEVICES, refuse_request
from fastopt.backends.planning import (
    bump_versions,
    joined_norm,
    members,
    named_refusal,
    planned_parameters,
)


def _version() -> str:
    try:
        return version("fastopt")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


@functools.cache
def _card(device: torch.device) -> str:
    if device.type == "cpu":
        return "the host simulator"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


class CudaBackend:
    """Elementwise updates of all parameters of a card in a launch or two.

    Args:
        native: The native module, or why there is none.
        device: The device type whose tensors it takes. The host simulator takes the CPU's.
    """

    name = "cuda"

    def __init__(self, native: ModuleType | str, device: str = "cuda") -> None:
        self.native = None if isinstance(native, str) else native
        self.device = device
        self._absent = native if isinstance(native, str) else ""

    @functools.cached_property
    def missing(self) -> str:
        """Why the module cannot be used, or "".

        Asked for at first use: it initialises CUDA, and a process that has done so cannot be forked
        and no longer heeds CUDA_VISIBLE_DEVICES.
        """
        if self.native is None:
            return self._absent
        reason: str = self.native.unavailable() or self.native.initialise(torch)
        return reason

    def supports(self, request: ParameterRequest) -> str | None:
        """Plain tensors on a card, of any strides; not what autograd has to record."""
        if request.param.device.type != self.device:
            return f"the parameter is on {request.param.device}"
        if self.native is None or self.missing:
            return self.missing
        if request.rule not in self.native.update_rules:
            return f"no kernel has the update rule {request.rule!r}"
        reason = refuse_request(request, self.device)
        return reason or selfcheck.refusal("optimizer_step", self, request.param.device)

    def identity(self, device: torch.device) -> dict[str, str]:
        """The card, and what its kernels' results could hang on."""
        assert self.native is not None and self.native.__file__ is not None
        build = Path(self.native.__file__).stat()
        return {
            "card": _card(device),
            "driver": str(self.native.driver_version()),
            "torch": torch.__version__,
            "fastopt": _version(),
            "build": f"{build.st_size} bytes of {build.st_mtime_ns}",
        }

    def supports_attention(self, request: AttentionRequest) -> str | None:
        """Plain tensors of fp32, bf16 or fp16 on a card, of up to 256 features."""
        if self.native is None:
            return self._absent
        reason = cuda_attention.refuse(self.native, request, self.device)
        return reason or self._unproven("attention", request.device)

    def attention_forward(
        self, request: AttentionRequest, inference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp; nothing hangs on ``inference``."""
        return cuda_attention.forward(self._usable_native(), request)

    def attention_backward(
        self,
        request: AttentionRequest,
        output_gradient: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        bias_wanted: bool,
        sinks_wanted: bool,
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key, value, bias and sinks; empty where the last are not wanted."""
        return cuda_attention.backward(
            self._usable_native(),
            request,
            output_gradient,
            output,
            logsumexp,
            bias_wanted,
            sinks_wanted,
        )

    def supports_linear_cross_entropy(self, request: LinearCrossEntropyRequest) -> str | None:
        """Plain tensors on a card."""
        if self.native is None:
            return self._absent
        reason = cuda_linear_cross_entropy.refuse(self.native, request, self.device)
        return reason or self._unproven("linear_cross_entropy", request.device)

    def linear_cross_entropy_forward(
        self, request: LinearCrossEntropyRequest, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss and gradients; see ``linear_cross_entropy``."""
        return cuda_linear_cross_entropy.forward(self._usable_native(), request, wanted)

    def linear_cross_entropy_backward(
        self, request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients."""
        native = self._usable_native()
        return cuda_linear_cross_entropy.backward(native, request, gradient, wanted)

    def supports_lstm(self, request: LstmRequest) -> str | None:
        """Plain tensors on a card; inside a graph's capture no packed sequences."""
        if self.native is None:
            return self._absent
        reason = refuse_lstm(request, self.device)
        reason = reason or cuda_lstm.refuse_capture(self.native, request)
        return reason or self._unproven("lstm", request.device)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _unproven(self, family: str, device: torch.device) -> str | None:
        """Why a family's kernels are not to be used on a card; Dynamo does not look into it."""
        return self.missing or selfcheck.refusal(family, self, device)

    def lstm_forward(
        self, layer: LstmRequest, packed: Tensor | None, save: bool
    ) -> tuple[Tensor, ...]:
        """One layer; see ``cuda_lstm``. Nothing is ever packed for a card."""
        return cuda_lstm.forward(self._usable_native(), layer, save)

    def lstm_backward(
        self,
        layer: LstmRequest,
        gradients: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """Gradients of one layer."""
        return cuda_lstm.backward(self._usable_native(), layer, gradients, saved, wanted)

    def _usable_native(self) -> ModuleType:
        """For operators that are called without a request before: by exported code, say."""
        if self.native is None or self.missing:
            raise RuntimeError(f"backend 'cuda' cannot run: {self.missing}")
        return self.native

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> CudaPlan:
        """Reads addresses and layouts once for many steps, card by card."""
        devices = dict.fromkeys(
            param.device
            for group, marks in zip(optimizer.param_groups, served, strict=True)
            for param, mine in members(group, marks)
            if mine
        )
        plans = []
        for device in devices:
            here = [
                [mine and param.device == device for param, mine in members(group, marks)]
                for group, marks in zip(optimizer.param_groups, served, strict=True)
            ]
            planned = planned_parameters(optimizer, here, created)
            assert self.native is not None
            plans.append(CardPlan(self.native, optimizer, planned, device))
        return CudaPlan(plans)


def _native() -> ModuleType | str:
    try:
        from fastopt import _native_cuda
    except ImportError as error:
        return f"the CUDA module is not there: {error}"
    return _native_cuda


CUDA = CudaBackend(_native())


class CudaPlan:
    """The plans of all cards."""

    def __init__(self, cards: list[CardPlan]) -> None:
        self._cards = cards

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


class CardPlan:
    """A native plan, and its memory on one card."""

    def __init__(
        self,
        native: ModuleType,
        optimizer: SteppedOptimizer,
        planned: Sequence[Sequence[Any]],
        device: torch.device,
    ) -> None:
        self._device = device
        # Where the simulator is the card, steps are counted where torch would count them on one.
        on_card = [
            group.get("capturable") or group.get("fused") for group in optimizer.param_groups
        ]
        self._native = native.OptimizerPlan(
            optimizer.state,
            planned,
            DLPACK_DEVICES[device.type],
            device.index or 0,
            device.type == "cpu" and not any(on_card),
        )
        self._functors = self._empty(native.functor_bytes * self._native.task_count)
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
        if order == 0 or (order != 2 and any(grad.is_complex() for grad in grads)):
            return torch.nn.utils.get_total_norm(grads, order).double()
        partials = torch.empty(
            max(self._native.chunk_count, 1), dtype=torch.float64, device=self._device
        )
        norm = torch.empty((), dtype=torch.float64, device=self._device)
        self._native.grad_norm(
            order, self._table.data_ptr(), partials.data_ptr(), norm.data_ptr(), self._stream()
        )
        return norm

    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Launches the kernels."""
        kept: list[Tensor] = []  # until they are launched: the allocator follows the stream

        def number(value: float | Tensor) -> float | tuple[int, bool]:
            if not isinstance(value, Tensor) or value.device.type == "cpu":
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
        stream = self._stream()
        if is_capturing(self._device):
            # A graph reads them at every replay, whatever becomes of this plan.
            vars(optimizer).setdefault("_read_by_graphs", []).append((self._table, self._functors))
        bump_versions(
            self._native.run(
                native_rules, native_tail, self._table.data_ptr(), self._functors.data_ptr(), stream
            )
        )

    def _stream(self) -> int:
        """The current stream, on which the plan's memory is in use from now on."""
        if self._device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self._device)
        for tensor in (self._table, self._functors):
            tensor.record_stream(stream)
        return stream.cuda_stream

    def release(self) -> None:
        """Drops the gradients."""
        self._native.release()

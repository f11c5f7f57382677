"""Optimizer steps by Triton's kernels: a launch for each group and dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.card_plan import CardPlan, CardPlans, Planned
from fastopt.backends.contract import Created, ParameterRequest, SteppedOptimizer
from fastopt.backends.cpu import MISSING_IN_TORCH
from fastopt.backends.cuda_context import is_capturing
from fastopt.backends.plain_tensors import REAL_DTYPES, refuse_request
from fastopt.backends.state_codes import SlotCode, native_codes
from fastopt.backends.triton import launch

# Of a program. Each thread has 16 bytes of each operand on their way, and there are registers for
# two programs on a multiprocessor: 32 KB of AdamW's loads, more than the latency of an H100's
# memory asks for.
WARPS = 8
WIDE_BYTES = 16 * 32 * WARPS
# Elements at a time where they are not read 16 bytes at a time.
ELEMENTS = 256
# Elements at a time whose state is coded: of more, registers would do for one program alone.
CODED_TILE = 4 * 32 * WARPS
# Tasks whose steps one program counts.
TASKS = 128


class Rule(NamedTuple):
    """What of ``kernels/update_rules.py`` belongs to the update of a rule's own name.

    Attributes:
        layout: Of the functor: a scalar or a flag in each word. A Lerp is one of each.
        fold: What computes the functor.
        factor: What multiplies the rule's product up, where it keeps one.
        direction: What is measured before a step that hangs on the whole parameter.
    """

    layout: str
    fold: str
    factor: str | None = None
    direction: str | None = None


RULES = {
    "sgd": Rule("s", "fold_sgd"),
    "momentum": Rule("sssss", "fold_momentum"),
    "nesterov": Rule("sssss", "fold_momentum"),
    "adam": Rule("ssfssss", "fold_adam"),
    "amsgrad": Rule("ssfssss", "fold_adam"),
    "lion": Rule("ssfsf", "fold_lion"),
    "adagrad": Rule("ss", "fold_adagrad"),
    "rmsprop": Rule("ssssssf", "fold_rmsprop"),
    "rmsprop_momentum": Rule("ssssssf", "fold_rmsprop"),
    "rmsprop_centered": Rule("ssssssf", "fold_rmsprop"),
    "rmsprop_centered_momentum": Rule("ssssssf", "fold_rmsprop"),
    "adamax": Rule("ssfss", "fold_adamax"),
    "radam": Rule("sfssssf", "fold_radam"),
    "nadam": Rule("sssfssss", "fold_nadam", "factor_nadam"),
    "schedule_free_adamw": Rule("ssssssss", "fold_schedule_free_adamw"),
    "lamb": Rule("ssssssss", "fold_lamb", direction="lamb_direction"),
    "lamb_without_trust": Rule("ssssssss", "fold_lamb"),
}

NOT_LOADED = "the kernels have not run yet, and a graph's capture cannot compile them"


def refuse(request: ParameterRequest, device: str) -> str | None:
    """Why the kernels do not step a parameter, or None."""
    if request.param.device.type != device:
        return f"the parameter is on {request.param.device}"
    if MISSING_IN_TORCH:
        return MISSING_IN_TORCH
    if request.rule not in RULES:
        return f"no kernel has the update rule {request.rule!r}"
    dtype = request.param.dtype.to_real()
    if dtype in REAL_DTYPES:
        codes = native_codes(request.coding, dtype)
        _, *kernel = _step_kernel(request.rule, REAL_DTYPES.index(dtype), *codes)
        if not _can_run(request.device, *kernel):
            return NOT_LOADED
    return refuse_request(request, device)


def plan(
    optimizer: SteppedOptimizer, served: Sequence[Sequence[bool]], created: Created
) -> CardPlans:
    """Reads addresses and layouts once for many steps, card by card."""
    return CardPlans(TritonPlan, optimizer, served, created)


def _can_run(device: torch.device, *kernel: Any) -> bool:
    return not is_capturing(device) or launch.is_loaded(device, *kernel)


class Uploaded:
    """Words on a card, brought there whenever they are others than before.

    What has been brought is never written again: a captured graph may read it.

    Args:
        device: The card.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.there = torch.empty(0, dtype=torch.int64, device=device)
        self.staged: Tensor | None = None

    def bring(self, words: memoryview) -> None:
        """Copies on the current stream."""
        here = torch.frombuffer(words, dtype=torch.int64)
        if self.staged is None or not torch.equal(here, self.staged):
            # Fresh memory: the copy of another step may not have been made yet.
            pinned = self._device.type != "cpu"
            self.staged = torch.empty_like(here, pin_memory=pinned).copy_(here)
            self.there = self.staged.to(self._device, non_blocking=True)


class TritonPlan(CardPlan):
    """Launches from Python what the native plan says."""

    def __init__(self, optimizer: SteppedOptimizer, planned: Planned, device: torch.device) -> None:
        super().__init__(_native_cpu.TritonPlan, optimizer, planned, device)
        self._records = Uploaded(device)
        self._norm_records = Uploaded(device)

    def _norm(self, grads: list[Tensor], order: float) -> Tensor:
        if order != 2:
            return _norm_by_torch(grads, order)
        launches = self._native.measure(self._table.data_ptr())
        partials = torch.zeros(self._native.chunk_count, dtype=torch.float64, device=self._device)
        if launches:
            self._norm_records.bring(self._native.records())
            self._stream()
        for dtype, place, chunks in launches:
            self._run(
                "_grad_norm_kernel", chunks, (dtype,), self._norm_records.there, place, partials,
                **_tiles(dtype),
            )  # fmt: skip
        return partials.sum().sqrt()

    def _launch(self, rules: tuple[Any, ...], tail: tuple[Any, ...]) -> list[Tensor]:
        written: list[Tensor]
        written, launches = self._native.run(
            rules, tail, self._table.data_ptr(), self._functors.data_ptr()
        )
        if launches:
            self._records.bring(self._native.records())
            self._stream()
        for rule, slots, dtype, place, tasks, chunks, code, param_code in launches:
            record = self._records.there, place
            functions = launch.kernels("update_rules")
            layout, fold, factor, direction = RULES[rule]
            tiles = _tiles(dtype)
            self._run(
                "_advance_steps_kernel", -(-tasks // TASKS), (rule, dtype), *record,
                FOLD=getattr(functions, fold), FACTOR=factor and getattr(functions, factor),
                LAYOUT=layout, HYPERPARAMETER_COUNT=_native_cpu.update_rules[rule][1],
                STORED=tiles["STORED"], BLOCK=TASKS,
            )  # fmt: skip
            if direction is not None:
                self._fold_squares(
                    chunks, tasks, (rule, dtype), *record,
                    DIRECTION=getattr(functions, direction), LAYOUT=layout, SLOTS=slots, **tiles,
                )  # fmt: skip
            operator, kernel, *variant = _step_kernel(rule, dtype, code, param_code)
            if code != SlotCode.AS_PARAMETER:
                tiles = _coded_tiles(rule, dtype, code, param_code)
            self._run(
                kernel, chunks, variant, *record, operator=operator,
                UPDATE=getattr(functions, rule), LAYOUT=layout, SLOTS=slots, **tiles,
            )  # fmt: skip
        return written

    def _fold_squares(
        self, chunks: int, tasks: int, variant: tuple[Any, ...], *record: Any, **options: Any
    ) -> None:
        """The pass before the step of a rule that hangs on the whole parameter."""
        if chunks == 0:
            return
        squares = self._functors[self._native.squares_offset :].view(torch.float64)
        run = functools.partial(self._run, operator="layerwise_step")
        run("_measure_squares_kernel", chunks, variant, *record, squares, **options)
        constants = {name: options[name] for name in ("STORED", "CHUNK")}
        run("_fold_squares_kernel", tasks, variant, *record, squares, **constants, BLOCK=256)

    def _run(
        self,
        kernel: str,
        programs: int,
        variant: Sequence[Any],
        *arguments: Any,
        operator: str = "optimizer_step",
        **options: Any,
    ) -> None:
        """Launches a kernel; ``variant`` is what its constants hang on."""
        if programs == 0:
            return
        if not _can_run(self._device, kernel, *variant):
            raise RuntimeError(NOT_LOADED)
        function = getattr(launch.kernels(operator), kernel)
        launch.launch(function, (programs,), self._device, *arguments, **options)
        launch.mark_loaded(self._device, kernel, *variant)

    def _read(self) -> tuple[Tensor, ...]:
        return (*super()._read(), self._records.there, self._norm_records.there)

    def _leave_to_graph(self) -> tuple[Tensor | None, ...]:
        """A graph copies at each replay, not now: what it brings is not there yet."""
        left = (*self._read(), self._records.staged, self._norm_records.staged)
        self._records.staged = self._norm_records.staged = None
        return left


def _tiles(dtype: int) -> dict[str, Any]:
    """The constants of kernels that read a chunk, and their warps."""
    return {
        "STORED": launch.kernels("tasks").STORAGE[dtype],
        "CHUNK": _native_cpu.chunk,
        "WIDE": WIDE_BYTES // REAL_DTYPES[dtype].itemsize,
        "ELEMENTS": ELEMENTS,
        "num_warps": WARPS,
    }


def _step_kernel(rule: str, dtype: int, code: int, param_code: int) -> tuple[Any, ...]:
    """The kernel of a step, after its file, and what its constants hang on."""
    if code == SlotCode.AS_PARAMETER:
        return "optimizer_step", "_optimizer_step_kernel", rule, dtype
    return "coded_step", "_coded_step_kernel", rule, dtype, code, param_code


def _coded_tiles(rule: str, dtype: int, code: int, param_code: int) -> dict[str, Any]:
    """The same of ``_coded_step_kernel``."""
    return {
        "POSITIVE": _native_cpu.update_rules[rule][2],
        "CODE": int(code),
        "PARAM_CODE": int(param_code),
        "STORED": launch.kernels("tasks").STORAGE[dtype],
        "SLOT_STORED": launch.kernels("state_codes").SLOT_TYPES[code],
        "CHUNK": _native_cpu.chunk,
        "TILE": CODED_TILE,
        "ELEMENTS": ELEMENTS,
        "num_warps": WARPS,
        "fuses": False,
    }


def _norm_by_torch(grads: list[Tensor], order: float) -> Tensor:
    """Orders other than 2, which are rare."""
    if order == 0 or any(grad.is_complex() for grad in grads):
        return torch.nn.utils.get_total_norm(grads, order).double()
    there = [grad for grad in grads if grad.numel()]
    norms = torch._foreach_norm(there or grads, order, torch.float64)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    return norm

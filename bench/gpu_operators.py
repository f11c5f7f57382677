"""What ``make gpu`` measures, operator by operator, and the tables that it makes of the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch

from bench import (
    attention_contenders,
    linear_cross_entropy_contenders,
    lstm_contenders,
    optimizer_contenders,
)
from bench.attention_cases import GPU_ATTENTION_CASES
from bench.cases import Case
from bench.linear_cross_entropy_cases import GPU_LINEAR_CROSS_ENTROPY_CASES, LIGER
from bench.lstm_cases import GPU_LSTM_CASES
from bench.optimizer_cases import GPU_CASES, HUNDRED_MILLION, OptimizerCase
from bench.timing import OURS, Contender, Timing, interleaved
from fastopt import use_backend
from fastopt.backends.cuda_context import tf32_products

COPY_PROBE = "copy_ of 100M"
TRITON = "fastopt, Triton"
INTERPRETED_CASES = 9  # one of so many: Triton's interpreter takes seconds for a case
Figures = Mapping[str, Mapping[str, Any]]  # timings of the contenders of a case, by name


@dataclasses.dataclass(frozen=True)
class GpuOperator:
    """One table.

    Attributes:
        name: The operator's.
        cases: Its rows.
        contenders: What is timed, ours under the name ``OURS``.
        check_parity: Raises before a case is timed that gives wrong numbers.
        clipped: The case for the simulator, which is the CPU.
        limit: The head of the column that says how near the machine's limit we are.
        of_limit: That figure, from a case and its timings.
        stock: Torch's own forms; what it runs by default comes before its kernels by name.
        others: Who else has a column.
    """

    name: str
    cases: tuple[Any, ...]
    contenders: Callable[[Any], dict[str, Contender]]
    check_parity: Callable[[Any], None]
    clipped: Callable[[Any], Any]
    limit: str
    of_limit: Callable[[Any, Figures], str]
    stock: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def peers(self) -> tuple[str, ...]:
        """The columns after ours: a contender's median over ours."""
        return (TRITON, *self.stock, *self.others)


def _optimizer_contenders(case: Any) -> dict[str, Contender]:
    size = 1000 if case.device == "cpu" else HUNDRED_MILLION
    source, target = (torch.ones(size, device=case.device) for _ in range(2))
    contenders = optimizer_contenders.optimizer_contenders(case)
    return {**contenders, COPY_PROBE: Contender(lambda: target.copy_(source))}


def _clipped_optimizer(case: Any) -> Any:
    small = tuple(tuple(min(size, 40) for size in shape) for shape in case.shapes[:5])
    return dataclasses.replace(case, shapes=small)


def _of_copy(case: Any, timings: Figures) -> str:
    probe = 8 * HUNDRED_MILLION / timings[COPY_PROBE]["median"]
    return f"{case.elements * case.bytes_per_element / timings[OURS]['median'] / probe:.0%}"


def _teraflops(case: Any, timings: Figures) -> str:
    return f"{case.flops / timings[OURS]['median'] / 1e12:.3g}"


OPERATORS = (
    GpuOperator(
        "optimizer_step",
        GPU_CASES,
        _optimizer_contenders,
        optimizer_contenders.check_parity,
        _clipped_optimizer,
        "of copy_'s bandwidth",
        _of_copy,
        ("torch default", "torch foreach", "torch fused"),
    ),
    GpuOperator(
        "lstm",
        GPU_LSTM_CASES,
        lstm_contenders.lstm_contenders,
        lstm_contenders.check_parity,
        lstm_contenders.clipped,
        "TFLOP/s",
        _teraflops,
        ("torch default",),
    ),
    GpuOperator(
        "attention",
        GPU_ATTENTION_CASES,
        attention_contenders.gpu_attention_contenders,
        attention_contenders.check_parity,
        attention_contenders.clipped,
        "TFLOP/s",
        _teraflops,
        ("torch default", *attention_contenders.STOCK_KERNELS),
        ("FlexAttention", "flash-attn"),
    ),
    GpuOperator(
        "linear_cross_entropy",
        GPU_LINEAR_CROSS_ENTROPY_CASES,
        linear_cross_entropy_contenders.linear_cross_entropy_contenders,
        linear_cross_entropy_contenders.check_parity,
        linear_cross_entropy_contenders.clipped,
        "TFLOP/s",
        _teraflops,
        linear_cross_entropy_contenders.STOCK,
        (LIGER,),
    ),
)
ALL_CASES: tuple[Case, ...] = tuple(case for operator in OPERATORS for case in operator.cases)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a case gave.

    Attributes:
        timings: Of the contenders that took it, by name.
        failures: What each of ours raised that did not, in words, by its name.
    """

    timings: dict[str, Timing]
    failures: dict[str, str]


def measure(
    operator: GpuOperator,
    cases: Sequence[Any],
    synchronize: Callable[[], None],
    alone: AbstractContextManager[object],
    *,
    simulate: bool,
) -> Iterator[tuple[str, Measured]]:
    """Times some of an operator's cases, all contenders in turn.

    What has to be compiled is, before anything is timed within ``alone``. The simulator gets small
    cases, Triton a few of them.
    """
    if not simulate:
        for case in cases:
            with _products(case):
                _ready(operator, case, ("cuda", "triton"), synchronize)
        torch.cuda.empty_cache()  # the others need memory, too
    with alone:
        for case in cases:
            backends: tuple[str, ...] = ("cuda", "triton")
            if simulate:
                if operator.cases.index(case) % INTERPRETED_CASES:
                    backends = ("cuda",)
                case = operator.clipped(case)
                case = dataclasses.replace(case, device="cpu", rounds=3, limit_bar=0.0)
            with _products(case):
                contenders, failures = _ready(operator, case, backends, synchronize)
                timings = interleaved(contenders, case.rounds) if contenders else {}
            yield case.name, Measured(timings, failures)


@contextmanager
def _products(case: Any) -> Iterator[None]:
    """Products in the case's arithmetic; stock's LSTM has a switch of its own, which is on."""
    tf32 = getattr(case, "tf32", False)
    with tf32_products(tf32), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        yield


def _ready(
    operator: GpuOperator, case: Any, backends: Sequence[str], synchronize: Callable[[], None]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """All contenders of a case that take it, by name, and how those of ours failed that do not."""
    contenders, failures = {}, {}
    for backend in backends:
        name_of_ours = OURS if backend == "cuda" else TRITON
        if isinstance(case, OptimizerCase):  # an optimizer's own backend goes before
            case = dataclasses.replace(case, backend=backend)
        try:
            there = _checked_contenders(operator, case, backend, synchronize)
        except Exception as error:  # one that fails is a row of the table, not its end
            failures[name_of_ours] = f"{type(error).__name__}: {error}"
            continue
        contenders[name_of_ours] = there.pop(OURS)
        if backend == "cuda":
            contenders |= {name: peer for name, peer in there.items() if _runs(peer)}
    return contenders, failures


def _checked_contenders(
    operator: GpuOperator, case: Any, backend: str, synchronize: Callable[[], None]
) -> dict[str, Contender]:
    """A case's contenders once ours has given the right numbers, and has run."""
    with use_backend(backend):
        operator.check_parity(case)
        there = operator.contenders(case)
    finished = {name: _on(backend, each, synchronize) for name, each in there.items()}
    finished[OURS].prepare()
    finished[OURS].call()
    return finished


def _on(backend: str, contender: Contender, synchronize: Callable[[], None]) -> Contender:
    """A contender on a backend of ours, where it is ours; each call is waited for."""

    def finished(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with use_backend(backend):
                call()
            synchronize()

        return run

    return Contender(finished(contender.call), finished(contender.prepare))


def _runs(contender: Contender) -> bool:
    """Whether a contender takes the case: kernels of others refuse what they do not know."""
    try:
        contender.prepare()
        contender.call()
    except Exception as error:  # each package has errors of its own
        print(f"not timed: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def bars_of(case: Case) -> str:
    """In words, for a table's cell."""
    bars = [f"{bar.ratio:g}x {bar.contender}" for bar in case.bars]
    if case.limit_bar:
        bars.append(f"{case.limit_bar:.0%} of the limit")
    return "<br>".join(bars)


def best_of_stock(operator: GpuOperator, cases: Mapping[str, Figures]) -> dict[str, float]:
    """By case, the time of the fastest form of stock over ours."""
    found = {}
    for case in operator.cases:
        timings = cases.get(case.name, {})
        stock = [timings[name]["median"] for name in operator.stock if name in timings]
        if OURS in timings and stock:
            found[case.name] = min(stock) / timings[OURS]["median"]
    return found


def table(
    operator: GpuOperator,
    cases: Mapping[str, Figures],
    failures: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """Lines of Markdown; "not yet measured" where no card has produced a figure."""
    peers = operator.peers
    lines = [
        f"| case | fastopt, ms | {' | '.join(peers)} | {operator.limit} | bars |",
        "|" + "---|" * (len(peers) + 4),
    ]
    for case in operator.cases:
        timings, failed = cases.get(case.name, {}), failures.get(case.name, {})
        cells = ["failed" if name in failed else "" for name in (OURS, *peers)]
        limit = ""
        if case.name not in cases:
            cells[0] = "not yet measured"
        elif OURS in timings:
            ours = timings[OURS]["median"]
            cells[0] = f"{ours * 1e3:.3g}"
            for place, name in enumerate(peers, 1):
                if name in timings:
                    cells[place] = f"{timings[name]['median'] / ours:.2f}"
            limit = operator.of_limit(case, timings)
        lines.append(f"| {case.name} | {' | '.join([*cells, limit, bars_of(case)])} |")
    return lines


@contextmanager
def simulated_card() -> Iterator[None]:
    """Puts the host simulator behind the backend ``cuda``, Triton's interpreter behind ``triton``.

    The interpreter needs TRITON_INTERPRET=1 before the first kernel is defined.
    """
    from fastopt import _native_cuda_sim as simulator  # type: ignore[attr-defined]
    from fastopt.backends import registry
    from fastopt.backends.cuda import CudaBackend
    from fastopt.backends.triton.backend import TritonBackend

    simulated = {"cuda": CudaBackend(simulator, "cpu"), "triton": TritonBackend("cpu")}
    with mock.patch.dict(registry.BACKENDS, simulated):
        yield

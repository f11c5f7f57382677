"""Threads, forks and the interpreter's lock."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cases import ALL, OptimizerCase
from fastopt import optim

IDS = {"ids": lambda value: value.name}
BIG = 300_000  # enough for several threads


def stepped(case: OptimizerCase, threads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Trains with the kernels on ``threads`` threads and torch's own operations on one.

    Torch's hang in a forked child on more than one; ours have to run.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
        for size in (BIG, 513, 7, BIG // 3)
    ]
    params.append(torch.nn.Parameter(torch.randn(700, 300, generator=generator).to(dtype).t()))
    optimizer = case.make(params, backend="cpu")
    for step in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        torch.set_num_threads(threads if step else 1)  # the first step has torch make the state
        optimizer.step()
        torch.set_num_threads(1)
    state = [value.flatten() for s in optimizer.state.values() for value in s.values()]
    return torch.cat([p.detach().flatten() for p in params] + [v.to(dtype) for v in state])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_any_number_of_threads_gives_the_same_bits(case: OptimizerCase, dtype: torch.dtype) -> None:
    one = stepped(case, 1, dtype)
    for threads in (2, 3, 4):
        assert torch.equal(one, stepped(case, threads, dtype))


def test_two_optimizers_in_two_threads() -> None:
    expected = stepped(ALL[6], 2)
    results: list[torch.Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(stepped(ALL[6], 2))) for _ in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


def test_the_lock_is_free_while_the_kernel_runs() -> None:
    torch.set_num_threads(1)
    param = torch.nn.Parameter(torch.ones(1 << 25))
    param.grad = torch.ones(1 << 25)
    optimizer = optim.AdamW([param], backend="cpu")
    optimizer.step()
    ticks: list[float] = []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    start = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    done.set()
    counter.join()
    assert sum(start < tick < end for tick in ticks) >= 3


def test_one_optimizer_in_two_threads_is_refused_not_corrupted() -> None:
    torch.set_num_threads(1)
    param = torch.nn.Parameter(torch.ones(1 << 24))
    param.grad = torch.ones(1 << 24)
    optimizer = optim.SGD([param], lr=1.0, backend="cpu")
    optimizer.step()
    errors: list[str] = []
    steps = [0]

    def work() -> None:
        for _ in range(4):
            try:
                optimizer.step()
                steps[0] += 1
            except RuntimeError as error:
                errors.append(str(error))

    workers = [threading.Thread(target=work) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all("already stepping in another thread" in error for error in errors)
    assert steps[0] + len(errors) == 8
    assert torch.equal(param.detach(), torch.full_like(param, float(-steps[0])))


def _child(queue: multiprocessing.Queue[float]) -> None:
    queue.put(stepped(ALL[6], 4).double().sum().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_steps_after_the_parent_used_its_threads(method: str) -> None:
    expected = stepped(ALL[6], 4).double().sum().item()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(timeout=10)
        child.kill()


class _SteppingDataset(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return stepped(ALL[6], 2)[:10]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method: str) -> None:
    expected = stepped(ALL[6], 2)[:10]
    loader = torch.utils.data.DataLoader(
        _SteppingDataset(), num_workers=2, multiprocessing_context=method, timeout=90
    )
    batches = list(loader)
    assert len(batches) == 4 and all(torch.equal(batch[0], expected) for batch in batches)


@pytest.mark.parametrize("order", ["import torch, fastopt", "import fastopt, torch"])
def test_one_openmp_is_mapped_in_either_import_order(order: str) -> None:
    code = f"""{order}
param = torch.nn.Parameter(torch.ones({BIG}))
param.grad = torch.ones({BIG})
fastopt.optim.AdamW([param], backend="cpu").step()
maps = open("/proc/self/maps").read().split()
print(len({{path for path in maps if "libgomp" in path}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90
    )
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    from fastopt import _native_cpu

    if isa not in _native_cpu.instruction_sets:
        pytest.skip(f"this machine has no {isa}")
    files = ["test_optimizer_parity.py", "test_optimizer_layouts.py", "test_conversions.py"]
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", *(str(folder / name) for name in files)],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTOPT_CPU_ISA": isa, "FASTOPT_EXPECTED_ISA": isa},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:]


DIGEST = """
import hashlib, os, sys, threading
if AFFINITY:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from fastopt import nn, optim
from fastopt.nn.functional import attention

def work():
    generator = torch.Generator().manual_seed(0)
    def random(*shape):
        return torch.randn(shape, generator=generator)
    lstm = nn.LSTM(24, 40, 2, bidirectional=True, backend="cpu")
    with torch.no_grad():
        for weight in lstm.parameters():
            weight.copy_(random(*weight.shape) / 6)
    optimizer = optim.AdamW(lstm.parameters(), max_grad_norm=1.0, backend="cpu")
    heads = [random(2, 4, 90, 16).requires_grad_() for _ in "qkv"]
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        lstm(random(30, 16, 24))[0].square().mean().backward()
        optimizer.step()
        output = attention(*heads, causal=True, backend="cpu")
        seen += [output.detach(), *torch.autograd.grad(output.square().sum(), heads)]
    seen += [weight.detach() for weight in lstm.parameters()]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in seen)).hexdigest()

digests = [work()]
workers = [threading.Thread(target=lambda: digests.append(work())) for _ in "ab"]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert len(digests) == 3
torch.set_num_threads(1)  # torch's own threads do not outlive a fork
child = os.fork()
if child == 0:
    os._exit(0 if work() == digests[0] else 1)
assert os.waitpid(child, 0)[1] == 0
assert len(set(digests)) == 1
print(digests[0])
"""


def test_any_environment_gives_the_same_bits_in_threads_and_children() -> None:
    """Optimizer, LSTM and attention, one core and any ``OMP_NUM_THREADS``, also while forked."""
    digests = set()
    for threads, affinity in ((None, False), (None, True), ("3", False), ("7", True), ("1", False)):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = threads
        result = subprocess.run(
            [sys.executable, "-c", f"AFFINITY = {affinity}\n{DIGEST}"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=180,
        )
        assert result.returncode == 0, result.stderr
        digests.add(result.stdout)
    assert len(digests) == 1

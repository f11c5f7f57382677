"""``make harden-leaks``: memory stays as it is over 10,000 steps.

What the C library has handed out is compared, which shows some bytes a step, and resident memory,
which has what it does not know of. ``--steps`` asks for another number.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastopt
from fastopt import nn, optim
from fastopt.nn.functional import attention, linear_cross_entropy

# The smallest object of Python's has 16 bytes; torch and the interpreter keep some once.
BYTES_OF_A_STEP = 8
RESIDENT_LIMIT = 2 << 20


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def handed_out() -> int:
    """Bytes of malloc, mappings among them."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def optimizer_steps() -> Callable[[], None]:
    """Of several kinds of state and everything that surrounds a step."""
    sizes = [(300, 20), (513,), ()]
    makers: list[Callable[[Any], Any]] = [
        lambda params: optim.AdamW(params, max_grad_norm=1.0, ema_decay=0.9, clip_value=0.1),
        lambda params: optim.Adam(params, state_storage="8bit", min_8bit_size=200),
        lambda params: optim.LAMB(params),
        lambda params: optim.SGD(params, momentum=0.9),
    ]
    groups = [[torch.nn.Parameter(torch.randn(size)) for size in sizes] for _ in makers]
    optimizers = [make(params) for make, params in zip(makers, groups, strict=True)]

    def step() -> None:
        for optimizer, params in zip(optimizers, groups, strict=True):
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.step()

    return step


def short_lived_optimizers() -> Callable[[], None]:
    """One is made, steps and goes, with its state and its plan."""

    def step() -> None:
        params = [torch.nn.Parameter(torch.ones(600)) for _ in range(2)]
        optimizer = optim.Adam(params)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones(600)
            optimizer.step()

    return step


def lstm_passes() -> Callable[[], None]:
    """Forward and backward, and inference, which keeps packed weights."""
    lstm = nn.LSTM(9, 12, num_layers=2, bidirectional=True, proj_size=5, backend="cpu")
    data = torch.randn(5, 3, 9, requires_grad=True)

    def step() -> None:
        output, (h_n, c_n) = lstm(data)
        (output.sum() + h_n.sum() + c_n.sum()).backward()
        with torch.no_grad():
            lstm(data)

    return step


def attention_passes() -> Callable[[], None]:
    """Forward and backward with a learned bias, and inference."""
    inputs = [torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 20, 20, requires_grad=True)

    def step() -> None:
        attention(*inputs, attn_mask=bias, dropout_p=0.1, backend="cpu").sum().backward()
        with torch.no_grad():
            attention(*inputs, causal=True, backend="cpu")

    return step


def cross_entropies() -> Callable[[], None]:
    """Loss and gradients."""
    data, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.randint(50, (30,))

    def step() -> None:
        linear_cross_entropy(data, weight, target, backend="cpu").backward()

    return step


def conversions() -> Callable[[], None]:
    """A model and its optimizer change their classes and back."""
    model = torch.nn.Sequential(torch.nn.LSTM(4, 4), torch.nn.MultiheadAttention(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        fastopt.convert(model)
        ours = optim.from_torch(optimizer)
        optim.to_torch(ours)
        fastopt.revert(model)

    return step


WORK = (
    optimizer_steps,
    short_lived_optimizers,
    lstm_passes,
    attention_passes,
    cross_entropies,
    conversions,
)


def measured() -> tuple[int, int]:
    """What is in use when all garbage is gone."""
    gc.collect()
    return handed_out(), resident()


def main() -> None:
    """Prints a line of figures.

    Raises:
        SystemExit: Memory grew.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    start = time.monotonic()
    leaks, most_handed_out, most_resident = [], 0.0, 0
    for make in WORK:
        step = make()
        for _ in range(steps // 10):
            step()
        before, resident_before = measured()
        for _ in range(steps):
            step()
        after, resident_after = measured()
        of_a_step, more_resident = (after - before) / steps, resident_after - resident_before
        most_handed_out = max(most_handed_out, of_a_step)
        most_resident = max(most_resident, more_resident)
        if of_a_step > BYTES_OF_A_STEP or more_resident > RESIDENT_LIMIT:
            leaks.append(f"{make.__name__}: {of_a_step:.1f} bytes a step, {more_resident} resident")
    if leaks:
        raise SystemExit("\n".join(leaks))
    print(
        f"leaks: {len(WORK)} kinds of work, {steps} steps each, {time.monotonic() - start:.0f} s: "
        f"at most {most_handed_out:.2f} bytes a step and {most_resident / 1024:.0f} KiB resident"
    )


if __name__ == "__main__":
    main()

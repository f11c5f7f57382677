"""The one way to launch a Triton kernel."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

from fastopt.backends.cuda_context import compute_capability, is_capturing

# Of a card that the interpreter plays.
_SIMULATED_CAPABILITY = 90
_SIMULATED_PROCESSORS = 2

# Kernels by name, cards and what else tells compiled ones apart: they can be launched in a capture.
_loaded: set[tuple[Any, ...]] = set()


@functools.cache
def kernels(operator: str) -> ModuleType:
    """The kernels of an operator; Triton is imported with the first."""
    return importlib.import_module(f"fastopt.backends.triton.kernels.{operator}")


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> int:
    """The card's, or of the one that the interpreter plays."""
    return compute_capability(device) if device.type == "cuda" else _SIMULATED_CAPABILITY


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors the card has."""
    if device.type != "cuda":
        return _SIMULATED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def is_loaded(device: torch.device, *what: Any) -> bool:
    """Whether kernels have run on a card before, so that a graph's capture need not compile them.

    ``what`` tells apart what is compiled apart.
    """
    return (device, *what) in _loaded


def mark_loaded(device: torch.device, *what: Any) -> None:
    """Remembers it, outside of captures."""
    if not is_capturing(device):
        _loaded.add((device, *what))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    fuses: bool = True,
    **constants: Any,
) -> None:
    """Launches on the device's current stream.

    Args:
        kernel: A function of a module in ``kernels``.
        grid: Programs in up to three dimensions; with a zero among them, nothing runs.
        device: Of all tensors among the arguments.
        arguments: Those of the kernel, in its order.
        num_warps: Warps of a program.
        num_stages: Depth of the pipelines of its loops.
        fuses: Whether a product and a sum may be rounded once.
        constants: Its ``constexpr`` arguments.
    """
    if 0 in grid:
        return
    with _on(device):
        start(
            kernel, grid, *arguments, num_warps=num_warps, num_stages=num_stages,
            enable_fp_fusion=fuses, **constants,
        )  # fmt: skip


def launch_series(
    kernel: Any,
    launches: Iterable[tuple[tuple[int, int, int], Sequence[int]]],
    device: torch.device,
    *tensors: torch.Tensor,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Launches one kernel many times on the device's current stream.

    Only the first launch has Triton look for the compiled kernel, which takes longer than a small
    kernel runs; the others go straight to it.

    Args:
        kernel: As in ``launch``. Its arguments are tensors, then numbers that it is not specialised
            for, then constants.
        launches: A grid and the numbers, for each.
        device: Of all tensors.
        tensors: The kernel's, in its order.
        num_warps: Warps of a program.
        num_stages: Depth of the pipelines of its loops.
        constants: Its ``constexpr`` arguments, in its order.
    """
    compiled = None
    with _on(device):
        for grid, numbers in launches:
            if compiled is None:
                compiled = start(
                    kernel, grid, *tensors, *numbers, num_warps=num_warps, num_stages=num_stages,
                    enable_fp_fusion=True, **constants,
                )  # fmt: skip
            else:
                compiled[grid](*tensors, *numbers, *constants.values())


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """What is left to do on the card at hand; tests take its place to compile for others.

    Returns:
        The compiled kernel, or None in the interpreter.
    """
    return kernel[grid](*arguments, **options)

"""What calls of CUDA kernels hang on besides their tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Of a card, major and minor as one number: 90 for a Hopper."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def card_identity(device: torch.device) -> dict[str, str]:
    """The card, and the versions above it, that a verdict on kernels hangs on."""
    try:
        fastopt = version("fastopt")
    except PackageNotFoundError:  # run from a source tree that was never installed
        fastopt = "unknown"
    card = "no card"
    if device.type == "cuda":
        card = f"{torch.cuda.get_device_name(device)}, sm_{compute_capability(device)}"
    return {"card": card, "torch": torch.__version__, "fastopt": fastopt}


def stream_of(device: torch.device) -> int:
    """The current stream of a card; 0 in the simulator."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a graph records what is launched on the current stream."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()


def multiplies_in_tf32() -> bool:
    """Whether the user lets torch round factors of fp32 products on a card to tf32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Runs the block with fp32 products in tf32, or exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

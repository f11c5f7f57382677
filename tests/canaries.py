"""Memory with a known pattern around it, in which a write beside a tensor is seen.

A write that leaves the pattern as it is goes unnoticed. No update does: the pattern is a small
negative number in every floating dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

PATTERN = 0xA5
MARGIN = 4096  # bytes, a whole number of elements; a page keeps the alignment of what it surrounds
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Frame:
    """A tensor inside a larger buffer whose other bytes must stay as they are."""

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        offset: int = 0,
    ) -> None:
        """Lays a tensor out ``offset`` elements behind the margin; it has the pattern as well."""
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        elements = offset + (last + 1 if 0 not in shape else 0)
        size = MARGIN + -(-elements * dtype.itemsize // 64) * 64 + MARGIN
        self.buffer = torch.full((size,), PATTERN, dtype=torch.uint8, device=device)
        start = MARGIN // dtype.itemsize + offset
        self.tensor = torch.tensor([], dtype=dtype, device=device)
        self.tensor.set_(self.buffer.untyped_storage(), start, shape, strides)
        inside = torch.full((size,), 0, dtype=torch.int8, device=device)
        inside = inside.view(INTEGERS[dtype.itemsize])
        inside.as_strided(shape, strides, start).fill_(-1)
        self._inside = inside.view(torch.bool)

    def check(self) -> None:
        """Raises where a byte beside the tensor was written."""
        changed = (self.buffer != PATTERN).logical_and_(~self._inside)
        if changed.any():
            place = int(changed.nonzero()[0]) - self.tensor.data_ptr() + self.buffer.data_ptr()
            raise AssertionError(
                f"{int(changed.sum())} bytes beside a tensor were written, the first at byte "
                f"{place}: {self.tensor.dtype} of {tuple(self.tensor.shape)} with strides "
                f"{self.tensor.stride()}"
            )


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def _every_other(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * stride for stride in _dense(tuple(2 * size for size in shape)))


# Strides of a layout, and how many elements it begins behind an aligned address.
LAYOUTS: dict[str, tuple[Callable[[tuple[int, ...]], tuple[int, ...]], int]] = {
    "contiguous": (_dense, 0),
    "misaligned": (_dense, 1),
    "transposed": (lambda shape: _dense(shape[::-1])[::-1], 0),
    "column slice": (lambda shape: _dense((*shape[:-1], shape[-1] + 5)), 3),
    "every other": (_every_other, 1),
    "channels_last": (
        lambda shape: tuple(
            torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
        ),
        0,
    ),
}


def framed(values: Tensor, layout: str) -> Frame:
    """A copy of a tensor in a layout."""
    strides, offset = LAYOUTS[layout]
    shape = tuple(values.shape)
    frame = Frame(shape, strides(shape), values.dtype, values.device, offset=offset)
    frame.tensor.copy_(values)
    return frame


class CanaryMemory:
    """Every tensor that is allocated through torch's Python functions gets a frame."""

    ALLOCATING = (
        *((torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like", "full_like")),
        *((torch.Tensor, name) for name in ("new_empty", "new_zeros", "clone", "contiguous")),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces the functions until the test ends."""
        self.frames: list[Frame] = []
        for owner, name in self.ALLOCATING:
            monkeypatch.setattr(owner, name, self._framing(getattr(owner, name)))

    def _framing(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def allocate_framed(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            if (
                type(tensor) is not Tensor
                or tensor.requires_grad
                or tensor.is_meta
                or tensor.dtype.itemsize not in INTEGERS
                or tensor is arguments[0]
            ):
                return tensor
            frame = Frame(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            self.frames.append(frame)
            return frame.tensor.copy_(tensor)

        return allocate_framed

    def place(self, values: Tensor, layout: str = "contiguous") -> Tensor:
        """A copy of a tensor in a frame and a layout."""
        self.frames.append(framed(values, layout))
        return self.frames[-1].tensor

    def check(self) -> None:
        """Raises where a byte beside any tensor was written."""
        for frame in self.frames:
            frame.check()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a frame."""
        storage = tensor.untyped_storage().data_ptr()
        return any(frame.buffer.data_ptr() == storage for frame in self.frames)

"""What random tests draw: shapes, and tensors of any strides whose values lie on a grid."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from cases import random

sizes = st.one_of(
    st.lists(st.integers(0, 12), max_size=4).map(tuple), st.tuples(st.integers(0, 3000))
)


def on_grid(values: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of 1/64."""
    real = torch.view_as_real(values) if values.is_complex() else values
    rounded = (real * 64).round() / 64
    return torch.view_as_complex(rounded) if values.is_complex() else rounded


@st.composite
def strided(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, writable: bool) -> torch.Tensor:
    """A tensor with permuted dimensions, gaps, an offset and, if it is only read, expansion."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offset = draw(st.integers(0, 5))
    base_shape = [shape[d] * steps[d] for d in order]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    numel = int(torch.tensor(base_shape).prod()) if base_shape else 1
    base = on_grid(random((numel + offset,), dtype, generator))[offset:].view(base_shape)
    inverse = sorted(range(len(order)), key=lambda d: order[d])
    view = base.permute(inverse)[tuple(slice(None, None, step) for step in steps)]
    if not writable and shape and draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        if shape[dim]:
            view = view.narrow(dim, 0, 1).expand(shape)
    assert view.shape == shape
    return view

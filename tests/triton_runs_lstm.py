"""What ``triton_builds.py`` compiles of the LSTM: every kernel, tile and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastopt.backends.contract import LstmRequest
from fastopt.backends.cuda_context import tf32_products
from fastopt.backends.triton.backend import TritonBackend

STEPS, INPUTS = 2, 8


def passes(
    dtype: torch.dtype,
    hidden: int,
    batch: int,
    *,
    directions: int = 1,
    tf32: bool = False,
    projection: int | None = None,
) -> Callable[[TritonBackend], None]:
    """Both passes of one layer."""

    def run(backend: TritonBackend) -> None:
        def zeros(*shape: int) -> Any:
            return torch.zeros(shape, dtype=dtype)

        outputs = projection or hidden
        weights = [zeros(4 * hidden, INPUTS), zeros(4 * hidden, outputs)]
        weights += [zeros(outputs, hidden)] if projection else []
        layer = LstmRequest(
            *(zeros(STEPS, batch, INPUTS), None),
            *(zeros(directions, batch, outputs), zeros(directions, batch, hidden)),
            *(weights * directions, False, 1, directions == 2),
        )
        with tf32_products(tf32):
            output, hidden_now, cell, *saved = backend.lstm_forward(layer, None, True)
            wanted = [False] * (3 + len(layer.weights))  # products are torch's
            backend.lstm_backward(layer, (output, hidden_now, cell), [output, *saved], wanted)

    return run


# Hidden size and batch: each tile of each arithmetic is somebody's on a card of 132
# multiprocessors.
SIZES = (
    *((2048, 256), (1024, 256), (1024, 128), (1024, 64)),
    *((1024, 32), (1024, 16), (4096, 32), (4096, 16)),
)

RUNS: dict[str, Callable[[TritonBackend], None]] = {
    **{f"bf16 {size}": passes(torch.bfloat16, *size) for size in SIZES},
    **{f"fp16 {size}": passes(torch.float16, *size) for size in SIZES[2:4]},
    **{f"tf32 {size}": passes(torch.float32, *size, tf32=True) for size in SIZES},
    **{f"fp32 {size}": passes(torch.float32, *size) for size in SIZES},
    "bf16 both directions": passes(torch.bfloat16, 104, 33, directions=2),
    "odd": passes(torch.float32, 37, 5),
    "odd, of one": passes(torch.float32, 1, 1),
    "fp64": passes(torch.float64, 256, 8),
    "fp32 projected": passes(torch.float32, 256, 8, projection=64),
    "bf16 projected": passes(torch.bfloat16, 256, 8, projection=64),
}

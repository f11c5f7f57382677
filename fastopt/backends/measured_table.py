"""Written by ``python -m bench --render`` from ``bench/results/gpu-*.json``."""

from __future__ import annotations

# Backends by operator, dtype and compute capability, where not the first of the usual order.
FASTEST: dict[tuple[str, str, int], str] = {
    ("attention", "torch.bfloat16", 90): "torch",
    ("attention", "torch.float32", 90): "torch",
}

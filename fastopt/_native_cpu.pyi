from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

instruction_set: str
instruction_sets: tuple[str, ...]
update_rules: dict[str, tuple[int, int]]

def initialise(torch: ModuleType) -> str: ...
def may_overlap_itself(sizes: list[int], strides: list[int]) -> bool: ...
def lstm_forward(
    sizes: Sequence[int],
    batch_sizes: Sequence[int],
    layer: tuple[Tensor | None, ...],
    packed: Tensor | None,
    results: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def lstm_packed_bytes(sizes: Sequence[int], layer: tuple[Tensor | None, ...]) -> int: ...
def lstm_pack(
    sizes: Sequence[int], layer: tuple[Tensor | None, ...], packed: Tensor, threads: int
) -> None: ...
def lstm_backward(
    sizes: Sequence[int],
    batch_sizes: Sequence[int],
    layer: tuple[Tensor | None, ...],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def activate(function: str, input: Tensor, output: Tensor) -> None: ...
def fma_peak(threads: int) -> float: ...

class OptimizerPlan:
    def __init__(
        self, state: dict[Any, Any], groups: Sequence[Sequence[tuple[Any, ...]]]
    ) -> None: ...
    def collect(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], writing: bool
    ) -> list[tuple[int, int, str, bool]] | None: ...
    def gradients(self) -> list[Tensor]: ...
    def grad_norm(self, order: float, threads: int) -> float: ...
    def run(
        self, rules: tuple[Any, ...], tail: tuple[float, float, bool, float], threads: int
    ) -> list[Tensor]: ...
    def release(self) -> None: ...

class GradientList:
    def __init__(self, tensors: list[Tensor], of_parameters: bool) -> None: ...
    unreadable: str
    unwritable: str
    tensors: list[Tensor]
    has_complex: bool
    has_empty: bool
    dtypes: list[int]
    def norm(self, order: float, threads: int) -> float: ...
    def clip(self, scale: float, clip_value: float, threads: int) -> list[Tensor]: ...

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

instruction_set: str
instruction_sets: tuple[str, ...]
update_rules: dict[str, tuple[int, int]]

def initialise(torch: ModuleType) -> str: ...
def may_overlap_itself(sizes: list[int], strides: list[int]) -> bool: ...

class OptimizerPlan:
    def __init__(
        self, state: dict[Any, Any], groups: Sequence[Sequence[tuple[Any, ...]]]
    ) -> None: ...
    def collect(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], unscaling: bool
    ) -> list[tuple[int, int, str]] | None: ...
    def run(self, rules: tuple[Any, ...], unscale: float, threads: int) -> list[Tensor]: ...
    def release(self) -> None: ...

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

update_rules: dict[str, tuple[int, int]]
toolkit_version: int
functor_bytes: int

def unavailable() -> str: ...
def driver_version() -> int: ...
def initialise(torch: ModuleType) -> str: ...

class OptimizerPlan:
    def __init__(
        self,
        state: dict[Any, Any],
        groups: Sequence[Sequence[tuple[Any, ...]]],
        device_type: int,
        device_index: int,
        counts_here_on_host: bool,
    ) -> None: ...
    table_bytes: int
    table_version: int
    task_count: int
    chunk_count: int
    def collect(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], writing: bool
    ) -> list[tuple[int, int, str, bool]] | None: ...
    def gradients(self) -> list[Tensor]: ...
    def table(self, address: int) -> bytes: ...
    def grad_norm(
        self, order: float, table: int, partials: int, norm: int, stream: int
    ) -> None: ...
    def run(
        self,
        rules: tuple[Any, ...],
        tail: tuple[Any, ...],
        table: int,
        functors: int,
        stream: int,
    ) -> list[Tensor]: ...
    def release(self) -> None: ...

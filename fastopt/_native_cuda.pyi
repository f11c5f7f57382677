from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

update_rules: dict[str, tuple[int, int, int]]
toolkit_version: int

def unavailable() -> str: ...
def driver_version() -> int: ...
def initialise(torch: ModuleType) -> str: ...
def load_lstm_kernels(dtype: int, device_index: int) -> None: ...

class AttentionTensors:
    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        allowed: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
        query_starts: Tensor | None,
        key_starts: Tensor | None,
        used_keys: Tensor | None,
        scale: float,
        softcap: float,
        left: int,
        right: int,
        bottom_right: bool,
        dropout: float,
        seed: int,
    ) -> None: ...

most_attention_features: int

def load_attention(dtype: int, tf32: bool, device_index: int) -> None: ...
def attention_forward(
    layer: AttentionTensors,
    output: Tensor,
    logsumexp: Tensor,
    tf32: bool,
    device_type: int,
    device_index: int,
    stream: int,
) -> None: ...
def attention_backward(
    layer: AttentionTensors,
    output: Tensor,
    logsumexp: Tensor,
    output_gradient: Tensor,
    gradients: list[Tensor | None],
    deltas: Tensor,
    query_sums: Tensor | None,
    tf32: bool,
    device_type: int,
    device_index: int,
    stream: int,
) -> None: ...

class CrossEntropyRows:
    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        class_weights: Tensor | None,
        loss_scale: Tensor | None,
        z_scale: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        softcap: float,
        losses: Tensor,
        logsumexps: Tensor,
    ) -> None: ...

def load_cross_entropy(dtype: int, device_index: int) -> None: ...
def cross_entropy(
    rows: CrossEntropyRows, device_type: int, device_index: int, stream: int
) -> None: ...

class LstmLayer:
    def __init__(
        self,
        dtype: int,
        device_type: int,
        device_index: int,
        directions: int,
        steps: int,
        batch: int,
        tokens: int,
        hidden: int,
        first_token: Tensor | None,
    ) -> None: ...
    def grid(self, backward: bool, tf32: bool) -> tuple[int, int, bool, int]: ...
    def workspace(self, grid: tuple[int, int, bool, int]) -> tuple[int, int]: ...
    def exchange_width(self, backward: bool) -> int: ...
    def forward(
        self,
        grid: tuple[int, int, bool, int],
        tf32: bool,
        weights: Sequence[Tensor],
        exchange: Tensor,
        counters: Tensor,
        gates: Tensor,
        save_gates: bool,
        initial_hidden: Tensor,
        cells: Tensor,
        output: Tensor,
        final_hidden: Tensor,
        saved_cells: Tensor | None,
        stream: int,
    ) -> None: ...
    def backward(
        self,
        grid: tuple[int, int, bool, int],
        tf32: bool,
        weights: Sequence[Tensor],
        exchange: Tensor,
        counters: Tensor,
        gates: Tensor,
        saved_cells: Tensor,
        initial_cell: Tensor,
        output_gradient: Tensor | None,
        final_hidden_gradient: Tensor | None,
        cell_gradient: Tensor,
        gate_gradient: Tensor,
        initial_hidden_gradient: Tensor,
        partial_sums: Tensor | None,
        stream: int,
    ) -> None: ...
    def cell_forward(
        self,
        rows: int,
        gates: Tensor,
        product: Tensor,
        save_gates: bool,
        cells: Tensor,
        saved_cells: Tensor | None,
        hidden_out: Tensor,
        output: Tensor | None,
        stream: int,
    ) -> None: ...
    def cell_backward(
        self,
        rows: int,
        gates: Tensor,
        cells: Tensor,
        cells_before: Tensor,
        hidden_gradient: Tensor,
        output_gradient: Tensor | None,
        cell_gradient: Tensor,
        gate_gradient: Tensor,
        hidden_out: Tensor | None,
        stream: int,
    ) -> None: ...

class OptimizerPlan:
    def __init__(
        self,
        state: dict[Any, Any],
        groups: Sequence[Sequence[tuple[Any, ...]]],
        device_type: int,
        device_index: int,
        counts_here_on_host: bool,
    ) -> None: ...
    @property
    def table_bytes(self) -> int: ...
    @property
    def table_version(self) -> int: ...
    @property
    def functor_bytes(self) -> int: ...
    @property
    def squares_offset(self) -> int: ...
    @property
    def chunk_count(self) -> int: ...
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

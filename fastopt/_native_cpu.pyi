from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

instruction_set: str
instruction_sets: tuple[str, ...]
# Slots, hyperparameters, a bit for each slot that is never negative.
update_rules: dict[str, tuple[int, int, int]]
chunk: int

def initialise(torch: ModuleType) -> str: ...
def are_plain(tensors: list[Tensor | None], device_type: int) -> bool: ...
def may_overlap_itself(sizes: list[int], strides: list[int]) -> bool: ...

class LstmTensors:
    def __init__(
        self,
        input: Tensor,
        batch_sizes: Sequence[int] | None,
        initial_hidden: Tensor,
        initial_cell: Tensor,
        weights: Sequence[Tensor | None],
    ) -> None: ...

def lstm_forward(
    layer: LstmTensors, packed: Tensor | None, results: Sequence[Tensor | None], threads: int
) -> None: ...

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

def attention_check(layer: AttentionTensors) -> None: ...
def attention_forward(
    layer: AttentionTensors, output: Tensor, logsumexp: Tensor, inference: bool, threads: int
) -> None: ...
def attention_backward(
    layer: AttentionTensors,
    output: Tensor,
    logsumexp: Tensor,
    output_gradient: Tensor,
    gradients: list[Tensor | None],
    threads: int,
) -> None: ...
def random_words(seed: int, head: int, first_row: int, words: Tensor) -> None: ...

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

def cross_entropy(rows: CrossEntropyRows, threads: int) -> None: ...
def lstm_packed_bytes(layer: LstmTensors) -> int: ...
def lstm_pack(layer: LstmTensors, packed: Tensor, threads: int) -> None: ...
def lstm_backward(
    layer: LstmTensors,
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
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

class TritonPlan:
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
    def measure(self, table: int) -> list[tuple[int, int, int]]: ...
    def run(
        self, rules: tuple[Any, ...], tail: tuple[Any, ...], table: int, functors: int
    ) -> tuple[list[Tensor], list[tuple[str, int, int, int, int, int, int, int]]]: ...
    def records(self) -> memoryview: ...
    def release(self) -> None: ...

class GradientList:
    def __init__(self, tensors: list[Tensor], of_parameters: bool) -> None: ...
    @property
    def unreadable(self) -> str: ...
    @property
    def unwritable(self) -> str: ...
    @property
    def tensors(self) -> list[Tensor]: ...
    @property
    def has_complex(self) -> bool: ...
    @property
    def has_empty(self) -> bool: ...
    @property
    def dtypes(self) -> list[int]: ...
    def norm(self, order: float, threads: int) -> float: ...
    def clip(self, scale: float, clip_value: float, threads: int) -> list[Tensor]: ...

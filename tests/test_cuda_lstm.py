"""What is CUDA's own about the LSTM's kernels: grids, shared columns, checks of arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cards import DEVICE, IS_SIMULATED, card  # noqa: F401
from fastopt.backends import cuda_lstm
from fastopt.backends.cuda import CudaBackend
from fastopt.backends.cuda_lstm import CudaRecurrence
from lstm_cases import LstmCase, run
from test_card_lstm import (
    PACKED,
    SIZES,
    TF32,
    Canaries,
    _one_thread,  # noqa: F401
    check_tf32,
    ours,
    tf32,  # noqa: F401
)
from test_lstm_parity import (
    NAMED,
    NARROW,
    SHARP,
    _uninitialized_memory_is_nan,  # noqa: F401
    check,
    check_error,
)

pytestmark = pytest.mark.usefixtures("card")

OURS = ours("cuda")
PERSISTENT_DTYPES = (torch.float32, *NARROW)
# Several groups of the depth for each warp; the last does not fit the simulator's memory.
DEEP = [
    LstmCase("H264 B80", 5, 264, {}, 2, 80, initial=True),
    LstmCase(
        *("packed", 5, 258, {"bidirectional": True}, 3, 60),
        *(tuple(1 + n % 3 for n in range(60)), True),
    ),
    LstmCase("H520 B3", 5, 520, {"bidirectional": True}, 2, 3),
    *([] if IS_SIMULATED else [LstmCase("H1024 B70", 5, 1024, {}, 3, 70, initial=True)]),
]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of the persistent kernels, pass by pass; None for those that ran step by step."""
    found: list[Any] = []
    grid = CudaRecurrence.grid

    def spied(recurrence: Any, *, backward: bool) -> Any:
        found.append(grid(recurrence, backward=backward))
        return found[-1]

    monkeypatch.setattr(CudaRecurrence, "grid", spied)
    return found


@pytest.fixture
def large_card(card: CudaBackend) -> Iterator[None]:  # noqa: F811
    """Holds as many blocks as a real one."""
    if IS_SIMULATED:
        card.native.set_max_resident_blocks(80)  # type: ignore[union-attr]
    yield
    if IS_SIMULATED:
        card.native.set_max_resident_blocks(8)  # type: ignore[union-attr]


@pytest.fixture
def shared_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight blocks share the columns of the backward's products, however small they are."""
    grid = CudaRecurrence.grid

    def shared(recurrence: Any, *, backward: bool) -> Any:
        found = grid(recurrence, backward=backward)
        if found is None or not backward:
            return found
        layer = recurrence._layer
        return 1, -(-layer.batch // 16) * 16, layer.directions == 1, 8

    monkeypatch.setattr(CudaRecurrence, "grid", shared)


@pytest.mark.usefixtures("large_card")
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
@pytest.mark.parametrize("case", DEEP, **NAMED)
def test_many_hidden_units(case: LstmCase, dtype: torch.dtype, grids: list[Any]) -> None:
    (check if dtype is torch.float32 else check_error)(case, dtype, **OURS)
    assert all(grids)
    # Where each block would have to read much, blocks share their columns in the backward pass.
    shared = [grid[3] > 1 for grid in grids]
    assert not shared[0]
    if IS_SIMULATED:
        assert shared[1] == (case.batch != 3 or dtype is torch.float32)


@pytest.mark.usefixtures("large_card", "tf32")
@pytest.mark.parametrize("case", DEEP, **NAMED)
def test_many_hidden_units_as_tf32(case: LstmCase, grids: list[Any]) -> None:
    check_tf32(case, "cuda")
    assert all(grids)


@pytest.mark.usefixtures("shared_columns")
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SIZES[4:14], *PACKED, SHARP[1], SHARP[3]], **NAMED)
def test_blocks_that_share_columns(case: LstmCase, dtype: torch.dtype) -> None:
    (check if dtype is torch.float32 else check_error)(case, dtype, **OURS)


@pytest.mark.usefixtures("shared_columns", "tf32")
@pytest.mark.parametrize("case", TF32, **NAMED)
def test_blocks_that_share_columns_as_tf32(case: LstmCase) -> None:
    check_tf32(case, "cuda")


def test_which_way_a_layer_takes(grids: list[Any]) -> None:
    def grids_of(case: LstmCase, dtype: torch.dtype = torch.float32) -> set[Any]:
        grids.clear()
        run(case.pair(dtype, **OURS)[0], case.sample(dtype).to(DEVICE))
        assert len(grids) == 2 * case.options.get("num_layers", 1)
        return set(grids)

    projected = LstmCase("", options={"proj_size": 4})
    assert grids_of(projected) == grids_of(LstmCase(""), torch.float64) == {None}
    assert grids_of(LstmCase("", 5, 1025, seq_len=2)) == {None}
    if IS_SIMULATED:
        assert grids_of(LstmCase("", 5, 65)) == {None}
        assert grids_of(LstmCase("", 5, 64, batch=33)) == {(1, 48, True, 1)}
        one_after_the_other = LstmCase("", 5, 40, {"bidirectional": True})
        assert grids_of(one_after_the_other) == {(1, 16, False, 1)}
        in_parts = LstmCase("", 5, 9, {"bidirectional": True}, batch=30)
        assert grids_of(in_parts) == {(2, 16, True, 1)}
    else:
        assert None not in grids_of(LstmCase("", 5, 512))


@pytest.mark.skipif(not IS_SIMULATED, reason="a card's order is its own")
@pytest.mark.parametrize("columns", ["own", "shared"])
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(
    dtype: torch.dtype,
    columns: str,
    card: CudaBackend,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    if columns == "shared":
        request.getfixturevalue("shared_columns")
    cases = [PACKED[1], LstmCase("", 5, 33, {}, 5, 20)]
    results = []
    for seed in range(5):
        assert card.native is not None
        card.native.set_seed(seed)
        results.append([run(c.pair(dtype, **OURS)[0], c.sample(dtype)) for c in cases])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("columns", ["own", "shared"])
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
@pytest.mark.parametrize("case", [PACKED[1], SIZES[5], SIZES[9]], **NAMED)
def test_nothing_is_written_outside(
    dtype: torch.dtype,
    case: LstmCase,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if columns == "shared":
        request.getfixturevalue("shared_columns")
    canaries = Canaries()

    class Native:
        """Gives the kernels what they were given, with canaries around."""

        def __init__(self, native: Any) -> None:
            self._native = native

        def __getattr__(self, name: str) -> Any:
            return getattr(self._native, name)

        def _run(self, name: str, arguments: dict[str, Any]) -> None:
            tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
            inside = {name: canaries.around(tensor) for name, tensor in tensors.items()}
            getattr(self._native, name)(**{**arguments, **inside})
            for key, tensor in tensors.items():
                if not torch.equal(tensor, inside[key]):  # autograd counts writes of its own
                    tensor.copy_(inside[key])

        def forward(self, **arguments: Any) -> None:
            self._run("forward", arguments)

        def backward(self, **arguments: Any) -> None:
            self._run("backward", arguments)

    make = CudaRecurrence.__init__

    def wrapped(recurrence: Any, *arguments: Any) -> None:
        make(recurrence, *arguments)
        recurrence.native = Native(recurrence.native)

    monkeypatch.setattr(CudaRecurrence, "__init__", wrapped)
    (check if dtype is torch.float32 else check_error)(case, dtype, **OURS)
    assert len(canaries.buffers) > 10
    canaries.check()


LAYER: dict[str, Any] = {
    **{"dtype": 0, "device_type": cuda_lstm.DLPACK_DEVICES[DEVICE], "device_index": 0},
    **{"directions": 1, "steps": 2, "batch": 3, "tokens": 6, "hidden": 4, "first_token": None},
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": 9}, "no kernel has this dtype"),
        ({"directions": 3}, "1 or 2 directions"),
        ({"hidden": 0}, "1 or 2 directions"),
        ({"tokens": 5}, "every step has all rows"),
        ({"first_token": torch.zeros(2, dtype=torch.int64)}, r"integers of shape \[3\]"),
        ({"first_token": torch.zeros(3)}, r"integers of shape \[3\]"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_is_refused(
    changes: dict[str, Any],
    text: str,
    card: CudaBackend,  # noqa: F811
) -> None:
    there = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}
    assert card.native is not None
    with pytest.raises(ValueError, match=text):
        card.native.LstmLayer(**LAYER | there)


@pytest.mark.parametrize("name", ["gates", "cells", "exchange", "counters", "output", "weights"])
@pytest.mark.parametrize("change", ["short", "dtype", "strided"])
def test_a_tensor_that_does_not_fit_is_refused(
    name: str,
    change: str,
    card: CudaBackend,  # noqa: F811
) -> None:
    assert card.native is not None
    layer = card.native.LstmLayer(**LAYER)
    shapes = {
        **{"gates": (1, 6, 16), "initial_hidden": (1, 3, 4), "cells": (1, 3, 4)},
        **{"output": (6, 4), "final_hidden": (1, 3, 4), "saved_cells": (1, 6, 4)},
        **{"weights": (16, 4), "exchange": (2, 1, 3, layer.exchange_width(False))},
    }
    given: dict[str, Any] = {k: torch.zeros(shape, device=DEVICE) for k, shape in shapes.items()}
    given["counters"] = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    fitting = given[name]
    given[name] = {
        "short": fitting[..., :-1].contiguous(),
        "dtype": fitting.double(),
        "strided": fitting.repeat_interleave(2, -1)[..., ::2],
    }[change]
    if name == "counters" and change == "strided":
        given[name] = fitting.long()
    given["weights"] = [given["weights"]]
    with pytest.raises(ValueError, match="weight_hh must" if name == "weights" else f"{name} must"):
        layer.forward(grid=(1, 16, True, 1), tf32=False, save_gates=True, stream=0, **given)

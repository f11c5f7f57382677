"""What is Triton's own about the LSTM's kernels: machine code, bounds, launches in series."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cards import DEVICE, IS_SIMULATED, card  # noqa: F401
from fastopt.backends.triton import launch
from fastopt.backends.triton.lstm_tiles import TILES, Tile
from lstm_cases import LstmCase, assert_same, run
from test_card_lstm import PACKED, SIZES, Canaries, _one_thread, ours  # noqa: F401
from test_lstm_parity import NAMED, check, check_error
from test_triton_builds import builds

ARITHMETIC = {"bf16": "16 bit", "fp16": "16 bit", "tf32": "tf32", "fp32": "exact", "odd": "exact"}
# By the rows of a tile: what multiplies from 64 on, and what below.
MATRIX_INSTRUCTIONS = {
    80: ("mma.sync", "mma.sync"),
    90: ("wgmma.mma_async", "mma.sync"),
    100: ("tcgen05.mma", "mma.sync"),
}


def fused_builds() -> list[tuple[dict[str, Any], str, Tile]]:
    """Kernels that multiply, with their arithmetic and tile."""
    found = []
    for build in builds("lstm"):
        if "ROWS" in build["options"]:
            names = ("ROWS", "UNITS", "DEPTH", "num_warps", "num_stages")
            tile = Tile(*(int(build["options"][name]) for name in names))
            found.append((build, ARITHMETIC[build["run"].replace(",", "").split()[0]], tile))
    return found


def test_products_run_on_the_units_that_are_meant() -> None:
    for build, arithmetic, tile in fused_builds():
        expected = MATRIX_INSTRUCTIONS[build["capability"]][tile.rows < 64]
        assert build["matrix"] == ([] if arithmetic == "exact" else [expected]), build
        if build["matrix"] and expected != "tcgen05.mma":  # whose types are in a descriptor
            kind = build["run"].split()[0].replace("fp16", "f16")
            assert build["matrix_types"] == [kind], build


def test_every_tile_is_compiled() -> None:
    compiled: dict[tuple[str, str], set[Tile]] = {key: set() for key in TILES}
    for build, arithmetic, tile in fused_builds():
        if build["capability"] == 90:
            compiled[build["kernel"].split("_")[2], arithmetic].add(tile)
    assert compiled == {key: set(tiles) for key, tiles in TILES.items()}


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [PACKED[0], SIZES[5], SIZES[9]], **NAMED)
def test_nothing_is_written_outside(
    dtype: torch.dtype, case: LstmCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    canaries, start = Canaries(), launch.start

    def guarded(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_contiguous()]
        inside = {id(tensor): canaries.around(tensor) for tensor in tensors}
        start(kernel, grid, *[inside.get(id(a), a) for a in arguments], **options)
        for tensor in tensors:
            if not torch.equal(tensor, inside[id(tensor)]):  # autograd counts writes of its own
                tensor.copy_(inside[id(tensor)])

    monkeypatch.setattr(launch, "start", guarded)
    (check if dtype is torch.float32 else check_error)(case, dtype, **ours("triton"))
    assert len(canaries.buffers) > 10
    canaries.check()


@pytest.mark.usefixtures("card")
@pytest.mark.skipif(not IS_SIMULATED, reason="a card has compiled kernels of its own")
def test_a_series_goes_to_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LstmCase("", initial=True)
    lstm, _ = case.pair(torch.float32, **ours("triton"))
    expected = run(lstm, case.sample(torch.float32).to(DEVICE))
    start, starts = launch.start, []

    class Compiled:
        """Takes all arguments by their places, as Triton's class does."""

        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return self._kernel[grid]

    def started(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> Any:
        starts.append(kernel)
        start(kernel, grid, *arguments, **options)
        return Compiled(kernel)

    monkeypatch.setattr(launch, "start", started)
    lstm.zero_grad()
    assert_same(run(lstm, case.sample(torch.float32).to(DEVICE)), expected, torch.float32)
    assert len(starts) == 2  # a pass each

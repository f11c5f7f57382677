"""The example of small state: a short run, its tables and its plot."""

from pathlib import Path

from examples import run_example

import small_state  # isort: skip


def test_a_short_run_prints_bytes_and_draws_the_range(tmp_path: Path) -> None:
    plots = tmp_path / "losses.png", tmp_path / "range.png"
    result = run_example(
        "small_state.py", "--smoke", "--plot", plots[0], "--range-plot", plots[1],
        "--checkpoint", tmp_path / "state.pt",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "PASS" in result.stdout and "FAIL" not in result.stdout
    assert "learning rate of" in result.stdout and all(plot.stat().st_size for plot in plots)
    for contender in small_state.CONTENDERS:
        rows = [line for line in result.stdout.splitlines() if f"│ {contender.name} " in line]
        assert len(rows) >= 2
    cells = rows[-1].split("│")
    assert float(cells[2]) == 2 and float(cells[4]) == 0  # bf16, and no gradients

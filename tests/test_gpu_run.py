"""``make gpu`` with the host simulator as the card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu
from bench.gpu_operators import ALL_CASES


def test_a_dry_run_passes_every_stage_and_writes_json_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = gpu.stages

    def quick(simulate: bool, figures: Path) -> list[gpu.Stage]:
        """The build has been made, the parity suite runs beside this test."""
        listed = stages(simulate, figures)
        assert [stage.name.split()[0] for stage in listed[:5]] == ["build", *["parity"] * 4]
        return [gpu.Stage("build", [sys.executable, "-c", ""], 60), *listed[5:]]

    monkeypatch.setattr(gpu, "stages", quick)
    assert gpu.run_all(tmp_path, simulate=True) == 0
    result = json.loads((tmp_path / "gpu-the-host-simulator.json").read_text())
    assert result["simulated"] and set(result["cases"]) == {case.name for case in ALL_CASES}
    table = (tmp_path / "gpu-the-host-simulator.md").read_text()
    assert "say nothing" in table and "| benchmark | passed |" in table


def test_a_failing_or_slow_stage_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(simulate: bool, figures: Path) -> list[gpu.Stage]:
        python = [sys.executable, "-c"]
        return [
            gpu.Stage("build", [*python, "raise SystemExit(3)"], 60),
            gpu.Stage("slow", [*python, "import time; print('on', flush=True); time.sleep(60)"], 1),
            gpu.Stage("missing", ["no-such-program"], 60),
            gpu.Stage("last", [*python, "print('here')"], 60),
        ]

    monkeypatch.setattr(gpu, "stages", planted)
    assert gpu.run_all(tmp_path, simulate=False) == 3
    (file,) = tmp_path.glob("*.json")
    verdicts: dict[str, Any] = json.loads(file.read_text())["stages"]
    assert verdicts["build"]["verdict"] == "failed with 3"
    assert verdicts["slow"]["verdict"] == "stopped after 1 s"
    assert verdicts["slow"]["last_line"] == "on"
    assert verdicts["missing"]["verdict"].startswith("did not start")
    assert verdicts["last"]["verdict"] == "passed"


def test_nothing_is_measured_without_a_card() -> None:
    table = gpu.gpu_table(None)
    assert table.count("not yet measured") == len(ALL_CASES)

"""The programs of ``tests/native``: what they are made of, and what they hold against a kernel."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "native"))
    import instructions

    return instructions


def test_equal_counts_pass(instructions: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    instructions.compare({"avx2: step": 1000}, {"avx2: step": 1015, "avx2: clip": 1000})
    line = "instructions: 1 calls, the most grown by +1.50%; 1 more are not kept\n"
    assert capsys.readouterr().out == line


def test_a_slower_kernel_fails_and_is_named(
    instructions: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"avx2: step": 1000, "avx2: clip": 1000, "baseline: clip": 1000}
    with pytest.raises(SystemExit, match="1 of 3 calls take more"):
        instructions.compare(kept, {**kept, "avx2: step": 1030, "avx2: clip": 950})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "avx2: step: +3.0% instructions, 1000 before and 1030 now",
        "avx2: clip: -5.0% instructions, 1000 before and 950 now",
    ]


def test_a_call_that_is_gone_fails(instructions: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"that are gone: .*clip"):
        instructions.compare({"avx2: step": 1000, "avx2: clip": 1000}, {"avx2: step": 1000})


def test_the_counts_kept_are_counts(instructions: ModuleType) -> None:
    if not instructions.COUNTS.exists():
        pytest.skip("no counts are kept")
    for counts in instructions.json.loads(instructions.COUNTS.read_text()).values():
        assert "baseline" in {name.split(": ")[0] for name in counts}
        assert min(counts.values()) > 0

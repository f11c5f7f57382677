"""A demo that is killed keeps its last checkpoint, and goes on from it to the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import FOLDER, ROOT, run_example

EPOCHS = 3
TIMEOUT = 900.0  # a minute on a quiet core
ARGUMENTS = ("--smoke", "--epochs", EPOCHS)


def contents(checkpoint: Path) -> dict[str, Any]:
    """What has to be equal to the bit: everything but the times."""
    contenders = torch.load(checkpoint, weights_only=True)["contenders"]
    for state in contenders.values():
        for name in ("step_seconds", "tail_seconds"):
            del state["record"][name]
    return dict(contenders)


def assert_same(actual: Any, expected: Any) -> None:
    """Of tensors, dictionaries and lists of them."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected, strict=True):
            assert_same(left, right)
    else:
        assert actual == expected


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    checkpoint = folder / "checkpoint.pt"
    where = "--checkpoint", checkpoint, "--plot", folder / "plot.png"
    result = run_example("classify_text.py", *ARGUMENTS, *where)
    assert result.returncode == 0, result.stderr
    return contents(checkpoint)


def kill(place: str, number: int, arguments: list[str]) -> int:
    program = Path(__file__).with_name("killed_program.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), place, str(number), *arguments]
    return subprocess.run(command, capture_output=True, env=environment, timeout=TIMEOUT).returncode


@pytest.mark.parametrize(
    ("place", "share"), [("save", 2), ("save", 3), ("step", 0.4), ("step", 0.7), ("step", 0.99)]
)
def test_a_killed_demo_goes_on_from_its_last_checkpoint(
    place: str, share: float, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    steps = sum(len(state["record"]["losses"]) for state in uninterrupted.values())
    number = int(share) if place == "save" else int(share * steps)
    checkpoint = tmp_path / "checkpoint.pt"
    where = ["--checkpoint", str(checkpoint), "--plot", str(tmp_path / "plot.png")]
    arguments = [*map(str, ARGUMENTS), *where]
    assert kill(place, number, arguments) == -signal.SIGKILL
    kept = contents(checkpoint)
    whole = share - 1 if place == "save" else int(share * EPOCHS)
    for name, state in kept.items():
        losses = state["record"]["losses"]
        assert len(state["record"]["epoch_ends"]) == whole
        assert losses == uninterrupted[name]["record"]["losses"][: len(losses)]
    result = run_example("classify_text.py", *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert_same(contents(checkpoint), uninterrupted)


@pytest.fixture(scope="module")
def module() -> Any:
    sys.path.insert(0, str(FOLDER))
    import _contest

    return _contest


def test_any_part_of_a_checkpoint_and_any_flipped_bit_are_told(module: Any, tmp_path: Path) -> None:
    """Truncated at 200 places and flipped at 200: the program's error, or the very contents."""
    path = tmp_path / "checkpoint.pt"
    state = {"weights": torch.arange(300.0), "losses": [1.0, 2.0]}
    torch.save({"origin": {"seed": 0}, "contenders": {}, "more": state}, path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    damaged = [whole[: len(whole) * part // 200] for part in range(200)]
    for place in torch.randint(len(whole), (200,), generator=generator).tolist():
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
    told = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            module.load_checkpoint(path, [], {"seed": 0})
        except module.CheckpointError:
            told += 1
    assert told >= 200


@pytest.mark.parametrize(
    "foreign",
    [torch.ones(3), [1, 2], {}, {"origin": {"seed": 0}}, torch.nn.Linear(2, 2).state_dict(),
     {"origin": 3, "contenders": {}}],
    ids=str,
)  # fmt: skip
def test_a_foreign_checkpoint_is_told(module: Any, tmp_path: Path, foreign: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(foreign, path)
    with pytest.raises(module.CheckpointError):
        module.load_checkpoint(path, [], {"seed": 0})

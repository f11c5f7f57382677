"""The self-check: who is let in, what is kept, what goes wrong around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastopt
from cards import DEVICE, backend
from fastopt import optim
from fastopt.__main__ import print_selfcheck
from fastopt.backends import registry, selfcheck
from fastopt.backends.cuda import CudaBackend

FOLDER = Path(__file__).parent


class WrongPlan:
    """The native plan, but for a thousandth added to each element of what it steps."""

    def __init__(self, *arguments: Any) -> None:
        self._plan = backend().native.OptimizerPlan(*arguments)  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def run(self, *arguments: Any) -> Any:
        written = self._plan.run(*arguments)
        with torch.no_grad():
            for tensor in written:
                tensor += 1e-3
        return written


def wrong_card() -> CudaBackend:
    right = backend().native
    native = types.ModuleType("wrong")
    vars(native).update(vars(right))
    native.OptimizerPlan = WrongPlan  # type: ignore[attr-defined]
    return CudaBackend(native, DEVICE)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTOPT_SELFCHECK", raising=False)
    monkeypatch.setitem(registry.AUTO_ORDER, DEVICE, ("cuda", "torch"))
    selfcheck.forget()
    yield
    selfcheck.forget()


def use(monkeypatch: pytest.MonkeyPatch, card: CudaBackend) -> None:
    monkeypatch.setitem(registry.BACKENDS, "cuda", card)


def step(**options: Any) -> torch.Tensor:
    param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = optim.SGD([param], lr=0.5, **options)
    param.grad = torch.ones(5, device=DEVICE)
    optimizer.step()
    return param.detach().cpu()


def counted_checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    run = selfcheck.run

    def counting(family: str, *arguments: Any) -> list[selfcheck.Outcome]:
        ran.append(family)
        return run(family, *arguments)

    monkeypatch.setattr(selfcheck, "run", counting)
    return ran


def kept_files() -> list[Path]:
    return list(selfcheck.cache_directory().glob("*"))


def test_a_pass_lets_the_kernels_in_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, backend())
    ran = counted_checks(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (step() == 0.5).all() and (step(backend="cuda") == 0.5).all()
        selfcheck.forget()  # as in a new process
        step()
    assert ran == ["optimizer_step"]
    (file,) = kept_files()
    kept = json.loads(file.read_text())
    assert {"card", "driver", "torch", "fastopt", "build"} <= set(kept["identity"])
    assert len(kept["outcomes"]) >= 8 and all(error == "" for _, error in kept["outcomes"])


def test_a_wrong_kernel_goes_to_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, wrong_card())
    with pytest.warns(RuntimeWarning) as warned:
        assert (step() == 0.5).all()
        assert (step() == 0.5).all()
    mine = [w for w in warned if "self-check" in str(w.message)]
    assert len(mine) == 1
    assert "case 'SGD'" in str(mine[0].message) and "python -m fastopt selfcheck" in str(
        mine[0].message
    )
    with pytest.raises(RuntimeError, match=r"failed their self-check on this card \(SGD, "):
        step(backend="cuda")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outcomes": 3}', '{"outcomes": [["a"]]}', "\0"])
def test_a_corrupt_cache_is_made_anew(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    use(monkeypatch, backend())
    step()
    (file,) = kept_files()
    file.write_text(text)
    selfcheck.forget()
    ran = counted_checks(monkeypatch)
    assert (step() == 0.5).all() and ran == ["optimizer_step"]
    assert json.loads(file.read_text())["outcomes"]


def test_an_unwritable_cache_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use(monkeypatch, backend())
    ran = counted_checks(monkeypatch)
    assert (step() == 0.5).all() and (step() == 0.5).all()
    assert ran == ["optimizer_step"]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, wrong_card())
    monkeypatch.setenv("FASTOPT_SELFCHECK", "off")
    assert (step() != 0.5).any()
    monkeypatch.setenv("FASTOPT_SELFCHECK", "force")
    with pytest.warns(RuntimeWarning, match="self-check"):
        assert (step() == 0.5).all()
    use(monkeypatch, backend())
    ran = counted_checks(monkeypatch)
    selfcheck.forget()
    step()
    assert ran == ["optimizer_step"]
    monkeypatch.setenv("FASTOPT_SELFCHECK", "maybe")
    with pytest.raises(ValueError, match=r"FASTOPT_SELFCHECK must be one of .* got 'maybe'"):
        step()


def test_a_check_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, backend())

    def broken(device: torch.device, name: str) -> Iterator[selfcheck.Outcome]:
        yield selfcheck.Outcome("first", "")
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(selfcheck._checks, "optimizer_step", broken)
    with pytest.warns(RuntimeWarning, match="an illegal memory access"):
        assert (step() == 0.5).all()
    assert not kept_files()  # it may have been want of memory


def test_what_is_set_around_the_first_step_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, backend())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = optim.SGD([param], lr=0.5)
    param.grad = torch.ones(5, device=DEVICE)
    with warnings.catch_warnings(), torch.inference_mode(), torch.device("meta"):
        warnings.simplefilter("error")
        optimizer.step()
    assert (param == 0.5).all() and torch.equal(torch.rand(3), expected)
    (file,) = kept_files()
    assert all(error == "" for _, error in json.loads(file.read_text())["outcomes"])


def test_another_build_is_checked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, backend())
    step()
    identity = CudaBackend.identity

    def other(self: CudaBackend, device: torch.device) -> dict[str, str]:
        return {**identity(self, device), "driver": "another"}

    monkeypatch.setattr(CudaBackend, "identity", other)
    step()
    assert len(kept_files()) == 2


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from cards import backend, DEVICE\n"
        "from fastopt.backends import registry\n"
        "registry.BACKENDS['cuda'] = backend(); registry.AUTO_ORDER[DEVICE] = ('cuda', 'torch')\n"
        "from fastopt import optim, explain\n"
        "p = torch.nn.Parameter(torch.ones(3, device=DEVICE)); p.grad = torch.ones_like(p)\n"
        "o = optim.SGD([p], lr=0.5); o.step(); assert (p == 0.5).all()\n"
        "assert explain(o).parameters[0].backend == 'cuda'\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, env=environment)
        for _ in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    (file,) = (tmp_path / "fastopt" / "selfcheck").glob("*")
    assert json.loads(file.read_text())["outcomes"]


def test_explain_tells_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose first use has a family of kernels checked."""
    use(monkeypatch, backend())
    loss = fastopt.nn.LinearCrossEntropyLoss(3, 7, device=DEVICE)
    input, target = torch.randn(4, 3, device=DEVICE), torch.arange(4, device=DEVICE)
    (call,) = fastopt.explain(loss, input, target).calls
    assert call.backend == "cuda" and "[4, 3]" in call.task


def test_the_command_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, backend())
    assert print_selfcheck(backend()) == 0
    printed = capsys.readouterr().out
    assert printed.count("passed") >= 8 and "card " in printed and "FAILED" not in printed
    use(monkeypatch, wrong_card())
    assert print_selfcheck(wrong_card()) == 1
    assert "FAILED, shape []" in capsys.readouterr().out
    assert print_selfcheck(CudaBackend("no CUDA driver")) == 0
    assert "no card to check: no CUDA driver" in capsys.readouterr().out

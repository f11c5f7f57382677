"""``python -m fastopt`` on machines that this one is not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastopt
from fastopt import __main__ as command


def missing(name: str) -> Any:
    raise importlib.metadata.PackageNotFoundError(name)


def test_info_names_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines] == [name for name, _ in command.info()]


def test_selfcheck_without_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CUDA", "TRITON"):
        absent = SimpleNamespace(name=name.lower(), missing="no card")
        monkeypatch.setattr(command, name, absent)
    assert command.main(["selfcheck"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "backend 'cuda': no card to check: no card",
        "backend 'triton': no card to check: no card",
    ]


def test_without_the_cuda_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CUDA", SimpleNamespace(native=None, missing="built without nvcc"))
    assert dict(command.info())["CUDA module"] == "built without nvcc"


def test_the_module_says_which_driver_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    native = SimpleNamespace(
        __file__="cuda.so", toolkit_version=13020, driver_version=lambda: 12080
    )
    monkeypatch.setattr(command, "CUDA", SimpleNamespace(native=native, missing="too old"))
    assert dict(command.info())["CUDA module"] == (
        "cuda.so, built with CUDA 13.2, needs a driver for CUDA 13.0; "
        "the driver serves CUDA 12.8; not used: too old"
    )


def test_cards_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dict(command.info())["CUDA in torch"] == "CUDA 13.0, no usable device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "card {}".format)
    assert dict(command.info())["CUDA in torch"] == "CUDA 13.0, card 0, card 1"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert dict(command.info())["CUDA in torch"] == "torch was built without CUDA"


def test_triton_that_is_not_there_or_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dict(command.info())["Triton"] == "not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command, "version", missing)
    assert dict(command.info())["Triton"] == "installed, version unknown"


def test_a_source_tree_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(importlib.metadata, "version", missing)
        assert importlib.reload(fastopt).__version__ == "unknown"
    assert importlib.reload(fastopt).__version__ != "unknown"

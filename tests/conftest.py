from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if os.environ.get("FASTOPT_TEST_DEVICE") != "cuda":
    # Triton reads it where a kernel is defined; `triton_builds.py` compiles in another process.
    os.environ["TRITON_INTERPRET"] = "1"


def _quicken_the_interpreter() -> None:
    """Has Triton's interpreter patch its language once for each module of helpers.

    It does so at every call of a helper, which takes a millisecond, though the launch around the
    call has done so already.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(function: Any, *arguments: Any, **keywords: Any) -> Any:
        module = function.fn.__module__
        if module not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(module)
        return function.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    _quicken_the_interpreter()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test begins with the same seed and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

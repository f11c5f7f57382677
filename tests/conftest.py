from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a machine with a card has what it has
    pass
else:
    # The same draws on every machine and day; `make harden` draws many more.
    settings.register_profile("fastopt", derandomize=True)
    settings.load_profile("fastopt")

if os.environ.get("FASTOPT_TEST_DEVICE") != "cuda":
    # Triton reads it where a kernel is defined; `triton_builds.py` compiles in another process.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test begins with the same seed and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

"""Compiles Triton kernels for cards that are not there: ``python tests/triton_builds.py OPERATOR``.

The backend runs with tensors of the CPU, and every launch that it asks for is compiled to machine
code instead, as it would be on the card: same specialisation, same options. One line of JSON for
each kernel and card says what came out. A process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastopt.backends.triton import launch
from fastopt.backends.triton.backend import TritonBackend

CAPABILITIES = (80, 90, 100)
PROCESSORS = {80: 108, 90: 132, 100: 148}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentCard:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        """Compiled kernels are kept by this number."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        """None is used."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The card."""
        return GPUTarget("cuda", self._capability, 32)


def compiled_launches(run: Callable[[TritonBackend], None], capability: int) -> Iterator[Any]:
    """Every kernel that ``run`` launches, with its constants, compiled for a card."""
    launches: dict[Any, dict[str, Any]] = {}
    driver.set_active(AbsentCard(capability))

    def compile_instead(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        built = kernel.warmup(*arguments, grid=grid, **options)
        launches[built.hash] = {"kernel": kernel.__name__, "options": options, "built": built}

    launch.start = compile_instead
    launch.capability = lambda device: capability
    launch.processors = lambda device: PROCESSORS[capability]
    run(TritonBackend("cpu"))
    yield from launches.values()


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of a thread's stack, which is where values are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert found, report
    registers, stack, _, local = map(int, found.groups())
    return {"registers": registers, "spilled": stack + local}


def count(pattern: str, text: str) -> int:
    """How often a pattern occurs."""
    return len(re.findall(pattern, text))


def described(entry: dict[str, Any], capability: int) -> dict[str, Any]:
    """What a test wants to know of one compiled kernel."""
    ptx = entry["built"].asm["ptx"]
    wide = count(r"ld\.global\S*\.v[48]|ld\.global\S*\.v2\.b64|cp\.async\.c[ag]\S+ .*, 0x10", ptx)
    return {
        "kernel": entry["kernel"],
        "options": {name: str(value) for name, value in entry["options"].items()},
        "capability": capability,
        "shared": entry["built"].metadata.shared,
        **resources(entry["built"].asm["cubin"]),
        "matrix": sorted(set(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))),
        "matrix_types": sorted(set(re.findall(r"(?:f32|f16)\.(bf16|tf32|f16)\.", ptx))),
        "wide_loads": wide,
        "narrow_loads": count(r"ld\.global|cp\.async\.c[ag]", ptx) - wide,
    }


def main(operator: str) -> None:
    """Prints a line for each kernel, constants and card."""
    runs = import_module(f"triton_runs_{operator}").RUNS
    for capability in CAPABILITIES:
        for name, run in runs.items():
            with torch.no_grad():
                for entry in compiled_launches(run, capability):
                    print(json.dumps({"run": name, **described(entry, capability)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

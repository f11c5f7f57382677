"""``python -m fastopt info``: what a bug report needs; ``python -m fastopt selfcheck``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import fastopt
from fastopt import _native_cpu
from fastopt.backends import selfcheck
from fastopt.backends.cpu import MISSING_IN_TORCH
from fastopt.backends.cuda import CUDA
from fastopt.backends.registry import BACKENDS, requested
from fastopt.backends.triton.backend import TRITON


def main(arguments: list[str] | None = None) -> int:
    """Runs a command of the module.

    Args:
        arguments: The command line, without the program; None takes the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m fastopt")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction sets, native modules, CUDA and Triton")
    commands.add_parser("selfcheck", help="compare the kernels of each card with torch's, now")
    command = parser.parse_args(arguments).command
    if command == "selfcheck":
        return max([print_selfcheck(backend) for backend in (CUDA, TRITON)])
    for name, value in info():
        print(f"{name:<24}{value}")
    return 0


def print_selfcheck(backend: selfcheck.CheckedBackend) -> int:
    """Runs every family's check of a backend on every card and prints a table.

    Returns:
        1 where a case failed, otherwise 0.
    """
    if backend.missing:
        print(f"backend {backend.name!r}: no card to check: {backend.missing}")
        return 0
    count = torch.cuda.device_count() if backend.device == "cuda" else 1
    status = 0
    for index in range(count):
        device = torch.device(backend.device, index)
        print(f"{'backend':<24}{backend.name}")
        for name, value in backend.identity(device).items():
            print(f"{name:<24}{value}")
        for family in selfcheck.families():
            for case, error in selfcheck.run(family, backend, device):
                print(f"{family + ': ' + case:<48}{'FAILED, ' + error if error else 'passed'}")
                status = 1 if error else status
    return status


def info() -> list[tuple[str, str]]:
    """Names and values, in the order in which they are printed."""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    return [
        ("fastopt", fastopt.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"torch {torch.__version__}, {threads}"),
        ("instruction set", _native_cpu.instruction_set),
        ("instruction sets here", ", ".join(_native_cpu.instruction_sets)),
        ("CPU module", MISSING_IN_TORCH or str(_native_cpu.__file__)),
        ("update rules", ", ".join(_native_cpu.update_rules)),
        ("backends", f"{', '.join(BACKENDS)}; requested: {requested(None)}"),
        ("CUDA module", _cuda_module()),
        ("CUDA in torch", _cuda()),
        ("Triton", _triton()),
    ]


def _cuda_module() -> str:
    if CUDA.native is None:
        return CUDA.missing
    toolkit, driver = CUDA.native.toolkit_version, CUDA.native.driver_version()
    needs = f"built with CUDA {_dotted(toolkit)}, needs a driver for CUDA {toolkit // 1000}.0"
    found = f"the driver serves CUDA {_dotted(driver)}" if driver else "no driver found"
    usable = f"; not used: {CUDA.missing}" if CUDA.missing else ""
    return f"{CUDA.native.__file__}, {needs}; {found}{usable}"


def _dotted(version_number: int) -> str:
    return f"{version_number // 1000}.{version_number % 1000 // 10}"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, no usable device"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}, {', '.join(names)}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        return version("triton")
    except PackageNotFoundError:
        return "installed, version unknown"


if __name__ == "__main__":
    sys.exit(main())

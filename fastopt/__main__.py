"""``python -m fastopt info``: what a bug report needs."""

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
from fastopt.backends.cpu import MISSING_IN_TORCH
from fastopt.backends.registry import BACKENDS, requested


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
    parser.parse_args(arguments)
    for name, value in info():
        print(f"{name:<24}{value}")
    return 0


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
        ("CUDA module", "not part of this version"),
        ("CUDA in torch", _cuda()),
        ("Triton", _triton()),
    ]


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

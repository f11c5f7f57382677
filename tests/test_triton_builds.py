"""Triton's kernels, compiled for cards of three generations: what the machine code is like."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastopt.backends.triton.optimizer_step import RULES

TESTS = Path(__file__).parent
OPERATORS = tuple(
    path.stem.removeprefix("triton_runs_") for path in sorted(TESTS.glob("triton_runs_*.py"))
)

# Bytes of shared memory that a block can have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MOST_SPILLED = 64
# How runs begin whose sizes let nothing be aligned.
ODD = "odd"

# Beside what they read 16 bytes at a time, they read tables, numbers of a row, and tensors of any
# strides.
READ_IN_BOTH_WAYS = (
    "_optimizer_step_kernel",
    "_coded_step_kernel",
    "_advance_steps_kernel",
    "_measure_squares_kernel",
    "_fold_squares_kernel",
    "_grad_norm_kernel",
    "_cross_entropy_kernel",
)

# Loads of one number each that kernels of an operator need: lengths, and what each row has one of.
NARROW = {"attention": 12}

# What multiplies, by card; exact fp32 has no such instruction.
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@functools.cache
def builds(operator: str) -> list[dict[str, Any]]:
    """What ``triton_builds.py`` prints of an operator's kernels."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["FASTOPT_SELFCHECK"] = "off"
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    result = subprocess.run(
        [sys.executable, str(TESTS / "triton_builds.py"), operator],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kernel_fits_its_card(operator: str) -> None:
    found = builds(operator)
    assert {build["capability"] for build in found} == set(SHARED)
    for build in found:
        assert build["shared"] <= SHARED[build["capability"]], build
        assert build["spilled"] <= MOST_SPILLED, build


@pytest.mark.parametrize("operator", OPERATORS)
def test_loads_are_wide(operator: str) -> None:
    for build in builds(operator):
        if build["kernel"] not in READ_IN_BOTH_WAYS and not build["run"].startswith(ODD):
            allowed = NARROW.get(operator, 0)
            assert build["wide_loads"] + allowed >= build["narrow_loads"], build


def test_a_thread_of_an_optimizer_reads_16_bytes_of_each_operand_at_a_time() -> None:
    found = [build for build in builds("optimizer_step") if "WIDE" in build["options"]]
    read_besides_slots = {
        "_optimizer_step_kernel": 3,  # parameter, gradient, average
        "_measure_squares_kernel": 2,
        "_grad_norm_kernel": 1,
    }
    assert {build["kernel"] for build in found} == set(read_besides_slots)
    for build in found:
        operands = read_besides_slots[build["kernel"]] + int(build["options"].get("SLOTS", 0))
        assert build["wide_loads"] == operands, build


def test_every_update_rule_is_built() -> None:
    assert {build["run"].split(",")[0] for build in builds("optimizer_step")} == set(RULES)


def test_a_thread_of_the_cross_entropy_reads_16_bytes_of_logits_at_a_time() -> None:
    walks = {build["run"]: 0 for build in builds("linear_cross_entropy")}
    for build in builds("linear_cross_entropy"):
        size = {"float64": 8, "float32": 4}.get(build["run"].split(",")[0].split(".")[-1], 2)
        threads = 32 * int(build["options"]["num_warps"])
        walk = int(build["options"]["BLOCK"]) * size // (16 * threads)
        if not build["run"].startswith(ODD):
            assert build["wide_loads"] in (walk, 2 * walk) or "everything" in build["run"], build
            assert build["wide_loads"] >= walk
            walks[build["run"]] = max(walks[build["run"]], build["wide_loads"] // walk)
    assert all(count >= 2 for run, count in walks.items() if not run.startswith(ODD)), walks


@pytest.mark.parametrize("build_of", ["bf16", "fp16", "sequences", "tf32", "fp32"])
def test_attention_multiplies_by_the_instruction_meant(build_of: str) -> None:
    found = [
        build
        for build in builds("attention")
        if build["run"].startswith(build_of) and "TILE_KEYS" in build["options"]
    ]
    assert found
    for build in found:
        # Tiles of fewer rows than a group of warps multiplies are for the older instruction.
        name, options = build["kernel"], build["options"]
        rows = options["TILE_KEYS" if "key_gradient" in name else "TILE_QUERIES"]
        meant = MATRIX[build["capability"] if int(rows) >= 64 else 80]
        assert build["matrix"] == ([] if build_of == "fp32" else [meant]), build
        if build_of != "fp32" and meant != "tcgen05.mma":
            types = {"bf16": ["bf16"], "tf32": ["tf32"]}.get(build_of, ["f16"])
            assert build["matrix_types"] == types, build


def test_attention_of_16_bits_is_on_the_newest_tensor_cores() -> None:
    """But for gradients of keys of 256 features, and decoding, where memory sets the pace."""
    for build in builds("attention"):
        is_large = "256" in build["run"] and "key_gradient" in build["kernel"]
        has_tiles = "TILE_KEYS" in build["options"] and "decoding" not in build["run"]
        if build["run"].startswith("bf16") and has_tiles and not is_large:
            assert build["matrix"] == [MATRIX[build["capability"]]], build

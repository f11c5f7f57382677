"""The host simulator: right kernels pass for every seed, wrong ones are caught."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "host_sim"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DFASTOPT_HOST_SIM", "-fPIC", "-pthread"]
FLAGS += ["-Wno-unknown-pragmas", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,bounds", "-fno-sanitize-recover=bounds"]

RIGHT = {
    "attention": ["products_bf16", "products_fp16", "products_fp32", "products_tf32"],
    "blocks": [
        "block_sum",
        "exited_threads_do_not_count",
        "intrinsics",
        "shapes",
        "shared_memory_is_poisoned",
        "shuffles",
        "votes",
        "waits_within_the_block",
        "works_after_an_error",
    ],
    "memory": [
        "flag_with_fence",
        "grid_sync",
        "last_block_with_fence",
        "lock",
        "more_resident_blocks",
        "other_atomics",
        "own_elements_are_no_race",
        "same_value_is_no_race",
        "shared_memory_of_blocks_stays_apart",
        "sums_of_atomics",
    ],
    "tiles": [
        "copy_async",
        "copy_async_with_zeros",
        "layout_bf16",
        "layout_fp16",
        "layout_tf32",
        "load_matrix",
        "load_matrix_transposed",
        "product_bf16",
        "product_fp16",
        "product_tf32",
        "tf32_ignores_low_bits",
    ],
}

# Kernels with one synchronisation too few. Their results are wrong, which is how a test of the
# kernel would see it.
WRONG = {
    "attention": [],
    "blocks": ["block_sum_without_barrier", "missing_syncwarp"],
    "memory": ["flag_without_fence", "last_block_without_fence", "grid_without_sync"],
    "tiles": ["copy_async_before_the_wait"],
}

THREAD = r"kernel body_kernel, block \(\d,0,0\), thread \(\d+,0,0\): "
KERNEL = "kernel body_kernel: "
ERRORS = {
    "attention": {},
    "blocks": {
        "barrier_against_warp_operation": THREAD
        + r"deadlock: 33 thread\(s\) wait at __syncthreads; 31 .* __syncwarp .* lanes 0x00000020",
        "different_barriers": THREAD + "__syncthreads(_or)? while other threads wait at",
        "divergent_shuffle": THREAD + "__(shfl|ballot)_sync .* names lane .* which is at __",
        "empty_block": KERNEL + "the block is empty",
        "empty_grid": "kernel shapes_kernel: the grid is empty",
        "exception": THREAD + "an exception leaves the kernel: of the kernel",
        "large_block": KERNEL + "a block of 33 x 32 x 1 threads",
        "much_shared_memory": KERNEL + "232449 bytes of dynamic shared memory",
        "not_in_its_own_mask": THREAD + "__syncwarp: the calling lane is not in its own mask",
        "other_masks": THREAD + "__syncwarp with mask .* names lane .* with mask",
        "shuffle_of_a_partial_warp": THREAD + "a shuffle in which lane 0 reads lane 16",
        "shuffle_without_the_others": THREAD + "a shuffle in which lane 0 reads lane 16",
        "spins_on_a_plain_read": THREAD + "this thread does not come to a synchronisation",
        "trap": THREAD + "__trap",
        "waits_for_a_value": THREAD + "this thread waits for a value that never comes",
    },
    "memory": {
        "grid_sync_not_cooperative": THREAD + "grid_sync in a launch that is not cooperative",
        "grid_sync_that_a_block_misses": KERNEL + r"deadlock: 2 block\(s\) wait at grid_sync, 1",
        "grid_sync_that_a_thread_misses": THREAD
        + r"deadlock: 1 thread\(s\) wait at __syncthreads; 31 thread\(s\) wait at grid_sync",
        "many_cooperative_blocks": KERNEL + "a cooperative grid of 9 blocks, of which 8 fit",
        "overlapping_registration": "register_memory: the range overlaps",
        "race": KERNEL + r"race: blocks \(0,0,0\) and \(1,0,0\) write different values",
        "race_with_an_atomic": f"({THREAD}|{KERNEL})race: blocks",
        "waits_for_a_block_that_is_not_resident": THREAD
        + "this thread waits for a value that never comes; only blocks of a cooperative launch",
    },
    "tiles": {
        "copy_async_misaligned": THREAD + "cp.async: an address is not aligned",
        "copy_async_without_commit": THREAD + "ends with cp.async that was never committed",
        "copy_async_to_global": THREAD + "cp.async: the target is not in shared memory",
        "load_matrix_from_global": THREAD + "ldmatrix: a row is not in shared memory",
        "product_of_half_a_warp": THREAD + "mma.m16n8k16 needs all 32 lanes",
    },
}

# Cases that a test of their own runs.
APART = {
    "attention": ["wrong_starts"],
    "blocks": ["four_host_threads", "speed"],
    "memory": [],
    "tiles": [],
}


def each(table: dict[str, list[str]] | dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    return [(program, case) for program, cases in table.items() for case in cases]


class Programs:
    """Builds every program once, the simulator once per set of flags."""

    def __init__(self, compiler: str, folder: Path) -> None:
        self.compiler = compiler
        self.folder = folder
        self.built: dict[str, Path] = {}

    def compile(self, output: str, *arguments: str | Path) -> Path:
        path = self.folder / output
        command = [self.compiler, *FLAGS, *map(str, arguments), "-o", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return path

    def simulator(self, variant: str, *flags: str) -> list[Path]:
        def compile_one(source: Path) -> Path:
            name = f"{variant}_{source.stem}.o"
            if name not in self.built:
                self.built[name] = self.compile(name, *flags, "-c", source)
            return self.built[name]

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile_one, sorted((ROOT / "csrc" / "host_sim").glob("*.cpp"))))

    def program(self, case_file: str, variant: str = "plain", *flags: str) -> Path:
        name = f"{variant}_{case_file}"
        if name not in self.built:
            objects = self.simulator(variant, "-O2", *flags)
            # -x holds for all files that follow.
            source = ["-x", "c++", CASES / f"{case_file}.cu", "-x", "none"]
            self.built[name] = self.compile(name, "-O1", *flags, *source, *objects)
        return self.built[name]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    return Programs(compiler, tmp_path_factory.mktemp("host_sim"))


def run(program: Path, case: str, seeds: int, first: int = 0) -> list[str]:
    """What the case says for each seed."""
    done = subprocess.run(
        [program, case, str(first), str(seeds)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == seeds
    return lines


@pytest.mark.parametrize(("program", "case"), each(RIGHT))
def test_right_for_every_seed(programs: Programs, program: str, case: str) -> None:
    assert run(programs.program(program), case, 20) == ["right"] * 20


@pytest.mark.parametrize(("program", "case"), each(WRONG))
def test_missing_synchronisation_gives_wrong_results(
    programs: Programs, program: str, case: str
) -> None:
    assert "wrong" in run(programs.program(program), case, 20)


@pytest.mark.parametrize(("program", "case"), each(ERRORS))
def test_errors_name_the_thread_and_the_cause(programs: Programs, program: str, case: str) -> None:
    for line in run(programs.program(program), case, 5):
        assert re.match("error: " + ERRORS[program][case], line), line


@pytest.mark.parametrize("program", RIGHT)
def test_every_case_is_expected_to_do_something(program: str) -> None:
    written = re.findall(r"^CASE\((\w+)\)", (CASES / f"{program}.cu").read_text(), re.MULTILINE)
    expected = [*RIGHT[program], *WRONG[program], *ERRORS[program], *APART[program]]
    assert sorted(written) == sorted(expected)


def test_one_seed_gives_one_order(programs: Programs) -> None:
    program = programs.program("blocks")
    texts = run(program, "not_in_its_own_mask", 20)
    assert texts == run(program, "not_in_its_own_mask", 20)
    assert len(set(texts)) > 5


def test_four_host_threads_launch_at_once(programs: Programs) -> None:
    assert run(programs.program("blocks"), "four_host_threads", 2) == ["right"] * 2


def test_a_block_takes_less_than_a_millisecond(programs: Programs) -> None:
    assert run(programs.program("blocks"), "speed", 1) == ["right"]


def test_library_that_python_loads(programs: Programs) -> None:
    source = ["-x", "c++", CASES / "blocks.cu", "-x", "none"]
    flags = ["-shared", "-O1", "-DCASES_IN_A_LIBRARY"]
    objects = programs.simulator("plain", "-O2")
    library = ctypes.CDLL(str(programs.compile("blocks.so", *flags, *source, *objects)))
    library.is_right.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.is_right.restype = ctypes.c_bool
    cases = [case.encode() for case in RIGHT["blocks"]]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda case: library.is_right(case, 7), cases))
    assert not library.is_right(b"divergent_shuffle", 7)


def test_portable_fibers(programs: Programs) -> None:
    program = programs.program("blocks", "ucontext", "-O0", "-DFASTOPT_FIBER_UCONTEXT")
    for case in ("block_sum", "works_after_an_error", "spins_on_a_plain_read"):
        expected = "error" if case == "spins_on_a_plain_read" else "right"
        assert [line[: len(expected)] for line in run(program, case, 3)] == [expected] * 3


@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("heap", r"heap-buffer-overflow[\s\S]*?#0 .* in read_kernel .*sanitizer\.cu:\d+"),
        ("dynamic_shared", r"heap-buffer-overflow[\s\S]*?#0 .* in read_dynamic_kernel .*\.cu:\d+"),
        ("static_shared", r"sanitizer\.cu:\d+:\d+: runtime error: index 64 out of bounds"),
        ("local", r"sanitizer\.cu:\d+:\d+: runtime error: index 8 out of bounds"),
    ],
)
def test_sanitizer_names_the_line(programs: Programs, case: str, report: str) -> None:
    program = programs.program("sanitizer", "sanitized", *SANITIZE)
    done = subprocess.run(
        [program, f"{case}_out_of_bounds", "0", "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("program", "case"),
    [
        ("sanitizer", "within_bounds"),
        ("blocks", "block_sum"),
        ("blocks", "works_after_an_error"),
        ("blocks", "four_host_threads"),
        ("memory", "last_block_with_fence"),
        ("memory", "grid_sync"),
        ("tiles", "copy_async"),
        ("tiles", "product_bf16"),
        ("attention", "wrong_starts"),
    ],
)
def test_sanitizer_has_nothing_against_right_kernels(
    programs: Programs, program: str, case: str
) -> None:
    assert run(programs.program(program, "sanitized", *SANITIZE), case, 3) == ["right"] * 3


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit")
def test_tile_instructions_compile_for_the_gpu(tmp_path: Path) -> None:
    targets = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]
    generate = [flag for target in targets for flag in ("-gencode", target)]
    command = ["nvcc", "-std=c++17", f"-I{ROOT / 'csrc'}", *generate, "-Werror", "all-warnings"]
    command += ["-c", str(CASES / "instructions.cu"), "-o", str(tmp_path / "instructions.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

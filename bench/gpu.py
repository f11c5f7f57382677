"""``make gpu``: builds, proves and measures everything on a machine with a card.

Each stage is a process with a time limit of its own, and one that fails does not stop the rest.
Verdicts and the benchmark's figures go into one JSON file, the table into a Markdown file beside
it, everything that was printed into ``gpu.log``. ``--only`` chooses stages. ``--simulate`` takes
the host simulator for the card: it proves this file, and its times say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu_operators import GpuOperator

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 8 * 60
PRINTED_CHARACTERS = 4000
CASES_OF_A_PART = 9  # of the benchmark: a process compiles for so many
LOCK = "lock"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, what it needs, and how long it may take."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def stages(simulate: bool, figures: Path) -> list[Stage]:
    """Everything, in order."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    parallel = [] if simulate else _parallel()
    # Several processes with all threads each would be in each other's way.
    card = {} if simulate else {"FASTOPT_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"}
    interpreter = {"TRITON_INTERPRET": "1"} if simulate else {}
    build = {"FASTOPT_HOST_SIM": "1"} if simulate else {"FASTOPT_CUDA": "on", **_archs()}
    not_triton = ["-k", "not triton"]
    optimizers = ("card_optimizers", "card_state_storage", "card_lamb")
    parity = _files(*optimizers, "cuda_device", "canaries") + not_triton
    activations = _files("card_attention", "card_lstm", "cuda_lstm") + not_triton
    both = ("attention", "attention_sequences", "linear_cross_entropy")
    shared = _files(*both) + ["-k", "cuda"]
    triton = _files(*optimizers, "card_attention", "card_lstm", "triton_lstm", *both)
    triton += ["-k", "triton"]
    result = [
        Stage("build", [*python, "setup.py", "--quiet", "build_ext", "--inplace"], 240, build),
        Stage("parity on the card", [*pytest, *parallel, *parity], 150, card),
        Stage("parity of LSTM and attention", [*pytest, *parallel, *activations], 200, card),
        Stage("parity of Triton's kernels", [*pytest, *parallel, *triton], 200, card),
        Stage("parity of shared cases", [*pytest, *parallel, *shared], 120, card),
    ]
    benchmark = [*python, "-m", "bench.gpu", "--figures", str(figures)]
    benchmark += ["--simulate"] if simulate else []
    # Each case is compared before it is timed.
    timed = {**interpreter, "FASTOPT_SELFCHECK": "off"}
    result.append(Stage("benchmark", benchmark, 400 if simulate else 240, timed))
    result.append(Stage("self-check", [*python, "-m", "fastopt", "selfcheck"], 120))
    if simulate:
        return result
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    some = ["tests/test_card_optimizers.py", "tests/test_card_state_storage.py"]
    some += ["-k", "any_layout or norm_types or any_dense_layout"]
    kernels = ["tests/test_card_attention.py", "tests/test_cuda_lstm.py", "-k", "each_kernel"]
    for tool, chosen in ("memcheck", some), ("memcheck", kernels), ("racecheck", kernels):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, *chosen]
        result.append(Stage(f"{tool}, {Path(chosen[0]).stem}", command, 150, card))
    cpu = [f"tests/test_{name}.py" for name in ("optimizer_parity", "training_tail", "grad_norm")]
    for isa in _instruction_sets():
        environment = {"FASTOPT_CPU_ISA": isa}
        result.append(Stage(f"CPU parity, {isa}", [*pytest, *cpu], 60, environment))
        quick = ["-m", "bench", "--quick", "--processes", "1", "--only", "AdamW, 1"]
        result.append(Stage(f"CPU benchmark, {isa}", [*python, *quick], 60, environment))
    return result


def _parallel() -> list[str]:
    """Several processes for the tests, where pytest knows how to."""
    if importlib.util.find_spec("xdist") is None:
        return []
    workers = str(min(12, os.cpu_count() or 1))
    return ["-n", workers, "--dist", "worksteal", "-p", "no:benchmark"]


def _files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


def _archs() -> dict[str, str]:
    """Machine code for the cards that are here alone."""
    if "FASTOPT_CUDA_ARCHS" in os.environ:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = [f"{major}{minor}" + ("a" if major == 9 else "") for major, minor in sorted(found)]
    return {"FASTOPT_CUDA_ARCHS": " ".join(names)}


def _instruction_sets() -> tuple[str, ...]:
    code = "from fastopt import _native_cpu as c; print(*c.instruction_sets)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return tuple(result.stdout.split()) or ("baseline",)


def run_stage(stage: Stage, seconds: float, log: Path) -> dict[str, Any]:
    """Runs a command, whatever becomes of it, and adds what it printed to a file."""
    print(f"== {stage.name}", flush=True)
    start = time.monotonic()
    limit = max(1.0, min(stage.seconds, seconds))
    try:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        verdict, output = f"did not start: {error}", ""
    else:
        try:
            output, _ = process.communicate(timeout=limit)
            verdict = f"failed with {process.returncode}" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            output, _ = process.communicate()
            verdict = f"stopped after {limit:.0f} s"
        except BaseException:  # such as Ctrl-C, which a session of its own does not hear
            os.killpg(process.pid, signal.SIGKILL)
            raise
    took = time.monotonic() - start
    with log.open("a") as file:
        file.write(f"== {stage.name}: {verdict}, {took:.0f} s\n{output}\n")
    print(
        output[-PRINTED_CHARACTERS:],
        f"== {stage.name}: {verdict}, {took:.0f} s",
        sep="\n",
        flush=True,
    )
    last = output.strip().rpartition("\n")[2][:200]
    return {"verdict": verdict, "seconds": round(took, 1), "last_line": last}


def run_all(folder: Path, simulate: bool, only: str = "", seconds: float = TOTAL_SECONDS) -> int:
    """Runs the stages whose names match and writes the files. Returns how many stages failed."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, log = folder / "figures", folder / "gpu.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(figures, ignore_errors=True)
    deadline = time.monotonic() + seconds
    verdicts: dict[str, dict[str, Any]] = {}
    build, *rest = stages(simulate, figures)
    if re.search(only, build.name):
        verdicts[build.name] = run_stage(build, build.seconds, log)
    # What the processor can do is known once the module is built.
    for stage in rest if simulate else stages(simulate, figures)[1:]:
        if re.search(only, stage.name):
            verdicts[stage.name] = run_stage(stage, deadline - time.monotonic(), log)
    result: dict[str, Any] = {"simulated": simulate, "stages": verdicts}
    result |= {"cases": {}, "failures": {}}
    for part in sorted(figures.glob("*.json")):
        there = json.loads(part.read_text())
        result["machine"] = there["machine"]
        result["cases"] |= there["cases"]
        result["failures"] |= there["failures"]
    shutil.rmtree(figures, ignore_errors=True)
    name = re.sub(r"[^a-z0-9]+", "-", result.get("machine", {}).get("card", "unknown").lower())
    path = folder / f"gpu-{name.strip('-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    table = gpu_table(result)
    path.with_suffix(".md").write_text(table + "\n")
    print(table)
    return sum(verdict["verdict"] != "passed" for verdict in verdicts.values())


def measure(simulate: bool, folder: Path) -> int:
    """Times all cases in parts. Returns how many of the parts failed.

    A part is a process that compiles beside the others, waits for all of them to be ready, and has
    the card to itself when it times.
    """
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "bench.gpu", "--figures", str(folder)]
    command += ["--simulate"] if simulate else []
    started = []
    with contextlib.ExitStack() as stack:
        for number in range(len(_parts())):
            # Of each part's own, which has it until it has compiled.
            compiling = stack.enter_context((folder / LOCK).open("w"))
            fcntl.flock(compiling, fcntl.LOCK_SH)
            descriptor = compiling.fileno()
            own = [*command, "--part", str(number), "--compiling", str(descriptor)]
            started.append(subprocess.Popen(own, cwd=ROOT, pass_fds=[descriptor]))
    return sum(process.wait() != 0 for process in started)


def _parts() -> list[tuple[GpuOperator, tuple[Any, ...]]]:
    """Operators with some of their cases each."""
    from bench.gpu_operators import OPERATORS

    return [
        (operator, operator.cases[first : first + CASES_OF_A_PART])
        for operator in OPERATORS
        for first in range(0, len(operator.cases), CASES_OF_A_PART)
    ]


def measure_part(simulate: bool, folder: Path, number: int, compiling: int) -> int:
    """Checks and times a part; what is done is in a file, should time run out.

    Args:
        simulate: Whether the host plays the card.
        folder: Of the files, and of the lock.
        number: Of the part.
        compiling: A file descriptor that shares the lock until it is closed.

    Returns:
        How many cases one of ours failed.
    """
    import torch

    from bench.gpu_operators import measure as measure_operator
    from bench.gpu_operators import simulated_card
    from bench.results import machine, provenance
    from fastopt.backends.triton import launch

    synchronize = (lambda: None) if simulate else torch.cuda.synchronize
    card = "the host simulator" if simulate else torch.cuda.get_device_name()
    capability = 0 if simulate else launch.capability(torch.device("cuda"))
    cases: dict[str, Any] = {}
    failures: dict[str, dict[str, str]] = {}
    result = {
        "machine": {**machine(), **provenance(), "card": card, "capability": capability},
        "cases": cases,
        "failures": failures,
    }
    operator, mine = _parts()[number]
    with simulated_card() if simulate else contextlib.nullcontext():
        alone = _alone(folder / LOCK, compiling)
        for name, measured in measure_operator(
            operator, mine, synchronize, alone, simulate=simulate
        ):
            timings = measured.timings.items()
            cases[name] = {who: dataclasses.asdict(timing) for who, timing in timings}
            print(name, {who: f"{timing.median * 1e3:.3f} ms" for who, timing in timings})
            if measured.failures:
                failures[name] = measured.failures
                print(name, measured.failures)
            beside = folder / f"{number}.part"  # time may run out in the middle
            beside.write_text(json.dumps(result))
            beside.replace(folder / f"{number}.json")
    return len(failures)


@contextlib.contextmanager
def _alone(lock: Path, compiling: int) -> Iterator[None]:
    """Waits until nobody compiles and nobody else is alone."""
    os.close(compiling)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gpu_table(result: dict[str, Any] | None) -> str:
    """Markdown tables; "not yet measured" where no card has produced a figure."""
    from bench.gpu_operators import OPERATORS, table

    result = result or {"cases": {}}
    lines = []
    if "machine" in result:
        machine = result["machine"]
        simulated = (
            " These are times of a simulator and say nothing." if result["simulated"] else ""
        )
        lines += [
            f"{machine['card']}, torch {machine['torch']}, fastopt at {machine['commit']}, "
            f"{machine['date']}.{simulated} Columns give the contender's median over fastopt's; an "
            "empty one was not installed or did not take the case.",
            "",
        ]
    for operator in OPERATORS:
        lines += [*table(operator, result["cases"], result.get("failures", {})), ""]
    if result.get("stages"):
        lines += ["| stage | verdict | seconds |", "|---|---|---|"]
        for name, stage in result["stages"].items():
            lines.append(f"| {name} | {stage['verdict']} | {stage['seconds']:.0f} |")
    return "\n".join(lines).rstrip()


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--simulate", action="store_true", help="the host simulator is the card")
    parser.add_argument("--only", default="", help="a pattern: the stages whose names match")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all stages")
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--compiling", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        part = arguments.part, arguments.compiling
        return 1 if measure_part(arguments.simulate, arguments.figures, *part) else 0
    if arguments.figures:
        return 1 if measure(arguments.simulate, arguments.figures) else 0
    failed = run_all(arguments.results, arguments.simulate, arguments.only, arguments.seconds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

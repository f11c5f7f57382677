"""``make harden-races``: the CPU kernels under ThreadSanitizer, and that it would report a race."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from native_program import build_program

# -O1: at -O3 a build takes four times as long, and what is instrumented is the same.
# The warnings that are turned off are those of GCC's own AVX-512 headers (its bug 105593).
FLAGS = ["-fsanitize=thread", "-O1", "-g1", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
RACE = "WARNING: ThreadSanitizer: data race"
# One call of each kernel, made by two threads at once.
RACY = (
    "step adam, 8bit",
    "step amsgrad bf16",
    "step lamb fp32",
    "grad norm 2 fp32",
    "clip fp32",
    "lstm forward, two chunks fp32",
    "lstm backward, two chunks fp32",
    "attention forward, plain fp32",
    "attention inference, one query fp32",
    "attention backward, split keys fp32",
    "cross-entropy of indices fp32",
)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program, which ends at the first race with a status of its own."""
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)


def main() -> None:
    """Prints a line of figures.

    Raises:
        SystemExit: There was a race, or one that is there on purpose was not reported.
    """
    program = build_program("races", FLAGS)
    for words in RACY:
        result = run(program, "--racy", words)
        if result.returncode != 66 or RACE not in result.stderr:
            raise SystemExit(f"two calls at once of {words!r} are no race: {result.stdout}")
    result = run(program)
    if result.returncode != 0:
        raise SystemExit(f"{result.stderr}\n{result.stdout}")
    print(f"tsan: {result.stdout.strip()}, 0 races; {len(RACY)} races on purpose were reported")


if __name__ == "__main__":
    main()

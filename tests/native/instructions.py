"""``make harden-instructions``: how many instructions the CPU kernels take, by callgrind.

Counts hang on the compiler, so that they are kept for each version of it; valgrind knows no
AVX-512. With ``--update`` the counts found replace those kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from native_program import ROOT, build_program, package_build

COUNTS = Path(__file__).with_name("instruction_counts.json")
TOLERANCE = 0.02  # what another C library's memset and memcpy change


def compiler_version() -> str:
    """Such as "g++ (Debian 12.2.0-14) 12.2.0"."""
    command = [*package_build()["find_compiler"](), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def find_valgrind() -> str:
    """The one that is installed, or else Debian's package, unpacked below ``build``.

    Raises:
        SystemExit: There is neither.
    """
    if found := shutil.which("valgrind"):
        return found
    folder = ROOT / "build" / "valgrind"
    program = folder / "usr" / "bin" / "valgrind"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fetch = "apt-get download valgrind || { apt-get update && apt-get download valgrind; }"
        unpack = f"({fetch}) && dpkg-deb --extract valgrind_*.deb ."
        if subprocess.run(["sh", "-c", unpack], cwd=folder, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit("callgrind is needed: apt-get install valgrind")
    os.environ["VALGRIND_LIB"] = str(folder / "usr" / "libexec" / "valgrind")
    os.environ["CPATH"] = str(folder / "usr" / "include")
    return str(program)


def count_instructions(valgrind: str, program: Path) -> dict[str, int]:
    """By instruction set and call."""
    with tempfile.TemporaryDirectory() as folder:
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=out"]
        result = subprocess.run([*command, program], cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"callgrind failed:\n{result.stderr}")
        counts = {}
        for dump in Path(folder).iterdir():
            text = dump.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
            if name and total:
                counts[name[1]] = int(total[1])
    return dict(sorted(counts.items()))


def compare(kept: dict[str, int], counts: dict[str, int]) -> None:
    """Prints what changed and a line of figures.

    Raises:
        SystemExit: A call takes more instructions than it did, or is not made any more.
    """
    if gone := kept.keys() - counts.keys():
        raise SystemExit(f"instructions: calls that are gone: {sorted(gone)}")
    growth = {name: counts[name] / count - 1 for name, count in kept.items()}
    for name, part in sorted(growth.items(), key=lambda item: -item[1]):
        if abs(part) > TOLERANCE:
            print(f"{name}: {part:+.1%} instructions, {kept[name]} before and {counts[name]} now")
    slower = sum(part > TOLERANCE for part in growth.values())
    if slower:
        raise SystemExit(f"instructions: {slower} of {len(growth)} calls take more than they did")
    new, most = len(counts) - len(kept), max(growth.values())
    print(
        f"instructions: {len(growth)} calls, the most grown by {most:+.2%}; {new} more are not kept"
    )


def main() -> None:
    """Counts, and compares or keeps.

    Raises:
        SystemExit: There is no valgrind, or ``compare`` raised it.
    """
    valgrind = find_valgrind()
    counts = count_instructions(valgrind, build_program("instructions"))
    version = compiler_version()
    kept = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if "--update" in sys.argv[1:]:
        COUNTS.write_text(json.dumps({**kept, version: counts}, indent=1) + "\n")
        print(f"instructions: {len(counts)} counts of {version} were kept")
    elif version not in kept:
        print(f"instructions: 0 of {len(counts)} compared, none are kept of {version}: --update")
    else:
        compare(kept[version], counts)


if __name__ == "__main__":
    main()

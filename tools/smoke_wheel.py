"""Installs one wheel file beside several releases of torch, each time anew, and checks it.

``python tools/smoke_wheel.py dist/fastopt-0.1.0-*.whl --torch 2.13.0 2.14.1``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import venv
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py").resolve()


def check(wheel: Path, torch: str) -> None:
    """Installs both into a new environment and runs the smoke test there."""
    with tempfile.TemporaryDirectory(prefix=f"fastopt-torch-{torch}-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        # What a developer's environment adds would be found before what was installed.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"torch=={torch}", "numpy", wheel], check=True, env=environment)
        subprocess.run([python, SMOKE], check=True, env=environment, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", required=True, metavar="VERSION")
    arguments = parser.parse_args()
    for torch in arguments.torch:
        check(arguments.wheel.resolve(strict=True), torch)
        print(f"{arguments.wheel.name}: passed beside torch {torch}", flush=True)


if __name__ == "__main__":
    main()

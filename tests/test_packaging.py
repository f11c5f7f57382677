"""What describes the package in several places says the same in each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# Asked for by users, installed by nobody here: it wants a card.
NOT_INSTALLED = {"deepspeed"}


def names(requirements: Iterable[str]) -> set[str]:
    """Of the packages, without versions, markers, extras and comments."""
    found = [re.match(r"[\w.-]+", line) for line in requirements]
    return {match.group().lower().replace("_", "-") for match in found if match}


def test_extras_are_what_the_requirements_install() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = names(
        [
            *(line for lines in extras.values() for line in lines),
            *PROJECT["dependencies"],
            *PYPROJECT["build-system"]["requires"],
        ]
    )
    files = list(ROOT.glob("requirements*.txt"))
    installed = names(line for path in files for line in path.read_text().splitlines())
    # Torch brings it.
    installed.add("typing-extensions")
    assert declared - {"fastopt"} - NOT_INSTALLED == installed


def test_one_version() -> None:
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_each_python_is_built_and_tried() -> None:
    """Classifiers, wheels and the workflow list the same releases of Python."""
    pythons = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), flags=re.MULTILINE)
    built = PYPROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{python.replace('.', '')}-*" for python in pythons]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    lists = re.findall(r"python: (\[.*\])", workflow)
    assert lists and all(re.findall(r"[\d.]+", text) == pythons for text in lists)


def test_the_workflow_runs_what_ci_runs() -> None:
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()

"""The command line of what adds figures to a machine's file of results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import results
from bench.results import Result

Part = tuple[Callable[[], Any], Callable[[Any], str]]  # measures figures, and makes a table of them


def make_parser(program: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser of what all of them take; ``quick`` is the help of that option."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="file of results to add this to")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def to_extend(path: Path | None, parser: argparse.ArgumentParser) -> Result:
    """What figures are merged into; the file of another machine ends the program."""
    try:
        return results.to_extend(path)
    except results.OtherMachineError as error:
        parser.error(str(error))


def add(parts: Mapping[str, Part], path: Path | None, parser: argparse.ArgumentParser) -> None:
    """Measures all parts, each a key of the file, writes them and prints their tables."""
    kept: Any = to_extend(path, parser)
    for key, (measure, _) in parts.items():
        kept[key] = measure()
    if path:
        results.save(kept, path)
    print(*(table(kept[key]) for key, (_, table) in parts.items()), sep="\n\n")

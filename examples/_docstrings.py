"""Docstrings: those of the standard library and of installed packages, read from their sources."""

from __future__ import annotations

import ast
import doctest
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from _corpus import EDGES
from _packages import folder_of

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
LEAST_WORDS = 3  # of a sentence
PROMPT, CONTINUED = ">>> ", "... "
PARAGRAPHS = re.compile(r"\n\s*\n")
SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
NOT_PROSE = re.compile(r">>>|^\s*[-=*~]{3,}|::|^\s*[.:@]|^ |\|", re.MULTILINE)


class Docstring(NamedTuple):
    file: str
    text: str


class Turn(NamedTuple):
    prompt: str
    reply: str  # often empty


def read_docstrings(packages: Sequence[str], containing: str = "") -> list[Docstring]:
    """Those of modules, classes and functions, each once, in the order of their files.

    Raises:
        DataError: A package is not there.
    """
    found: dict[str, Docstring] = {}
    for package in packages:
        for file, text in _docstrings_in(folder_of(package), containing):
            found.setdefault(text, Docstring(f"{package}/{file}", text))
    return list(found.values())


def sentences_of(docstring: str) -> list[str]:
    """The prose of a docstring; outer punctuation, which tells a first sentence, is left out."""
    paragraphs = [p.strip("\n") for p in PARAGRAPHS.split(docstring)]
    prose = (p for p in paragraphs if not NOT_PROSE.search(p))
    sentences = (" ".join(s.split()).strip(EDGES) for p in prose for s in SENTENCES.split(p))
    return [s for s in sentences if len(s.split()) >= LEAST_WORDS]


def turns_of(docstring: str) -> list[Turn]:
    """The examples of a docstring, as Python shows them."""
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # it is not indented as a session is
        return []
    return [Turn(prompt_of(example.source), example.want) for example in examples]


def prompt_of(source: str) -> str:
    """The lines that a user types, with what Python writes in front of them."""
    first, *others = source.rstrip("\n").split("\n")
    return "".join([f"{PROMPT}{first}\n", *(f"{CONTINUED}{line}\n" for line in others)])


def _docstrings_in(folder: Path, containing: str) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.py")):
        file = path.relative_to(folder)
        source = path.read_bytes()
        if LEFT_OUT.intersection(file.parts) or containing.encode() not in source:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that are none
                tree = ast.parse(source)
        except SyntaxError:
            continue
        for text in _docstrings_below(tree):
            if containing in text:
                yield file, text


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
        yield text
    if isinstance(node, ast.Module | ast.stmt):
        for statement in getattr(node, "body", ()):
            yield from _docstrings_below(statement)

"""Documents for a language model: the standard library's own prose and code."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _corpus import DataError
from _packages import STANDARD_LIBRARY, folder_of

HELD_OUT = 0.1  # of the documents


class Document(NamedTuple):
    name: str
    text: str


@dataclass(frozen=True)
class Library:
    """Documents, and which of them are held out to validate."""

    train: list[Document]
    validation: list[Document]


def read_library(modules: int) -> list[Document]:
    """Help topics, and the sources of so many top-level modules, in the order of their names."""
    topics = [Document(f"topic {name}", text) for name, text in pydoc_data.topics.topics.items()]
    paths = sorted(folder_of(STANDARD_LIBRARY).glob("*.py"))[:modules]
    return topics + [read_file(path) for path in paths]


def read_files(paths: Sequence[Path]) -> list[Document]:
    """A document for each file.

    Raises:
        DataError: There are too few to hold one out, or one is empty, missing or not UTF-8.
    """
    if len(paths) < 2:
        raise DataError(f"{paths[0]}: at least two files are needed, one to train and one to test")
    return [read_file(path) for path in paths]


def read_file(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{path}: empty")
    return Document(path.name, text)


def hold_out(documents: Sequence[Document], seed: int) -> Library:
    """Whole documents, so that no sentence that is validated was trained on next to its fellows."""
    order = np.random.default_rng(seed).permutation(len(documents))
    count = max(1, round(HELD_OUT * len(documents)))
    shuffled = [documents[i] for i in order]
    return Library(shuffled[count:], shuffled[:count])

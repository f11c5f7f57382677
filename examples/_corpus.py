"""Labelled texts: where they come from, how they are cleaned and how they are split."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import django
import numpy as np
import polib
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

# printf placeholders, {} and {{ }} placeholders, HTML tags and entities, links:
# the same in every language, so they say nothing about which one a text is in.
MARKUP = re.compile(
    r"%(?:\(\w+\)[-#0+.\d]*[a-zA-Z]?|[-#0+.\d]*[a-zA-Z%])"
    r"|\{\{?[^{}]*\}?\}|</?\w[^<>]*>|&\w+;|https?://\S+"
)
EDGES = " .,:;!?…。\uff01\uff1f、¡¿()[]\"'«»“”„"  # the escapes are full-width ! and ?
FOLDS = 10  # one fold to test, one to validate, eight to train


class DataError(Exception):
    """The data cannot be used; the message says where and why."""


class Example(NamedTuple):
    """One text. Examples of one group say the same thing and must not be separated."""

    text: str
    label: str
    group: str


class Split(NamedTuple):
    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Corpus:
    """Clean examples, with what cleaning removed and why."""

    examples: list[Example]
    read: int
    dropped: dict[str, int]


def strip_markup(text: str) -> str:
    return " ".join(MARKUP.sub(" ", text).split())


def identity(text: str) -> str:
    """Returns what two texts share when they differ in case or outer punctuation only."""
    return text.casefold().strip(EDGES)


def read_catalogues(language: str = "*") -> Corpus:
    """Reads the translated messages of Django and its contrib applications, of one language or all.

    The label is the language. The group is the English source, which is coarser than
    message id and context: two contexts of one source tend to share their translation.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for label, entry in catalogue_entries(Path(django.__path__[0]), language):
        sources = {identity(strip_markup(s)) for s in (entry.msgid, entry.msgid_plural)}
        group = identity(strip_markup(entry.msgid))
        for translation in (entry.msgstr, *entry.msgstr_plural.values()):
            if not translation:
                continue
            text = strip_markup(translation)
            if not any(map(str.isalpha, text)):
                dropped["no letters"] += 1
            elif identity(text) in sources:
                dropped["same as the English source"] += 1
            else:
                examples.append(Example(text, label, group))
    return _deduplicated(examples, dropped)


def catalogue_entries(folder: Path, language: str) -> Iterator[tuple[str, polib.POEntry]]:
    """The entries of the catalogues below a folder that are in use, with their languages."""
    for path in sorted(folder.glob(f"**/{language}/LC_MESSAGES/*.po")):
        for entry in polib.pofile(str(path)):
            if not (entry.obsolete or entry.fuzzy):
                yield path.parts[-3], entry


def read_csv(path: Path) -> Corpus:
    """Reads a UTF-8 file with a header and the columns ``text`` and ``label``.

    Raises:
        DataError: The file is missing or malformed; the message names the line.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for line, row in _records(path):
        label = row["label"].strip()
        text = " ".join(row["text"].split())
        if not label:
            raise DataError(f"{path}, line {line}: the label is empty")
        if text:
            examples.append(Example(text, label, identity(text)))
        else:
            dropped["empty text"] += 1
    return _deduplicated(examples, dropped)


def _records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    rows = csv.reader(_decoded_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1  # where the record starts: a quoted field may span lines
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        if row is None:
            break
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if missing := [name for name in ("text", "label") if name not in header]:
                raise DataError(
                    f"{path}, line {line}: the header lacks the column {' and '.join(missing)}"
                )
        elif len(row) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} fields, found {len(row)}")
        else:
            yield line, dict(zip(header, row, strict=True))
    if header is None:
        raise DataError(f"{path}, line 1: the file is empty, expected a header")


def _decoded_lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _deduplicated(examples: list[Example], dropped: Counter[str]) -> Corpus:
    """Keeps each text once, and only where its label is certain and frequent enough to split."""
    read = len(examples) + dropped.total()
    labels_of: defaultdict[str, set[str]] = defaultdict(set)
    for example in examples:
        labels_of[identity(example.text)].add(example.label)

    kept: dict[str, Example] = {}
    for example in examples:
        key = identity(example.text)
        if len(labels_of[key]) > 1:
            # Czech and Slovak agree on many words: there no single answer is right.
            dropped["text with several labels"] += 1
        elif key in kept:
            dropped["duplicate"] += 1
        else:
            kept[key] = example

    sizes = Counter(example.label for example in kept.values())
    clean = [example for example in kept.values() if sizes[example.label] >= FOLDS]
    if rare := len(kept) - len(clean):
        dropped[f"label with fewer than {FOLDS} texts"] = rare
    return Corpus(clean, read, dict(dropped))


def largest_labels(corpus: Corpus, count: int) -> Corpus:
    """Returns the part of the corpus that has the ``count`` most frequent labels."""
    sizes = Counter(example.label for example in corpus.examples)
    chosen = {label for label, _ in sizes.most_common(count)}
    kept = [example for example in corpus.examples if example.label in chosen]
    dropped = corpus.dropped | {"label left out": len(corpus.examples) - len(kept)}
    return Corpus(kept, corpus.read, dropped)


def split(examples: list[Example], seed: int) -> Split:
    """Splits 80/10/10, stratified by label, with every group in one part only.

    Raises:
        DataError: There is nothing to tell apart.
    """
    labels = label_names(examples)
    if len(labels) < 2:
        raise DataError(
            f"need at least 2 labels with {FOLDS} different texts each, found {len(labels)}"
        )
    targets = np.array([labels.index(example.label) for example in examples])
    groups = np.unique([example.group for example in examples], return_inverse=True)[1]
    folder = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    return split_by(examples, [fold for _, fold in folder.split(targets, targets, groups)])


def split_by(examples: list[Example], folds: Sequence[NDArray[np.int64]]) -> Split:
    def take(indices: Iterable[int]) -> list[Example]:
        return [examples[i] for i in indices]

    return Split(take(np.concatenate(folds[2:])), take(folds[1]), take(folds[0]))


def label_names(examples: Iterable[Example]) -> list[str]:
    return sorted({example.label for example in examples})

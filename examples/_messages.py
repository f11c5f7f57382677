"""Messages and their translations, from the catalogues of installed packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from _corpus import MARKUP, DataError, catalogue_entries, identity, strip_markup
from _families import split_families
from _packages import folder_of

SLOTS = [f"<{number}>" for number in range(8)]  # stand for the placeholders of a message
LEAST = 100  # pairs


class Pair(NamedTuple):
    """A message and its translation, with slots in place of what both have in common."""

    source: str
    target: str
    placeholders: tuple[str, ...]  # what the slots stand for
    keys: frozenset[str]  # pairs that share one say the same


@dataclass(frozen=True)
class Messages:
    """Pairs, which are in which part, and what cleaning removed."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    read: int
    dropped: dict[str, int]


def read_messages(packages: Sequence[str], language: str, seed: int) -> Messages:
    """Reads and splits what the packages have in a language.

    Raises:
        DataError: A package is not there, or there are too few translations.
    """
    pairs: dict[str, Pair] = {}
    dropped: Counter[str] = Counter()
    for source, target, others in _translations(packages, language):
        pair = pair_of(source, target, others)
        if isinstance(pair, str):
            dropped[pair] += 1
        elif pair.source in pairs:
            dropped["source seen before"] += 1
        else:
            pairs[pair.source] = pair
    kept = list(pairs.values())
    if len(kept) < LEAST:
        raise DataError(
            f"{', '.join(packages)}: {len(kept)} translations to {language!r}, {LEAST} are needed"
        )
    parts = split_families([pair.keys for pair in kept], seed)
    train, validation, test = ([kept[i] for i in part] for part in parts)
    return Messages(train, validation, test, len(kept) + dropped.total(), dict(dropped))


def pair_of(source: str, target: str, others: Sequence[str] = ()) -> Pair | str:
    """Puts slots in place of placeholders; returns why, if the pair is of no use.

    ``others`` are further messages that the pair must not be separated from.
    """
    source, target = " ".join(source.split()), " ".join(target.split())
    placeholders = MARKUP.findall(source)
    sources = {identity(strip_markup(text)) for text in (source, *others)}
    translation = identity(strip_markup(target))
    if not any(map(str.isalpha, strip_markup(source))):
        return "no letters"
    if translation in sources:
        return "same as the English source"
    if len(placeholders) > len(SLOTS):
        return "many placeholders"
    left = dict(enumerate(placeholders))
    slots = []
    for text in MARKUP.findall(target):
        number = next((n for n, placeholder in left.items() if placeholder == text), None)
        if number is None:
            return "placeholder that the source lacks"
        slots.append(SLOTS[number])
        del left[number]
    keys = frozenset({*sources, f"translation: {translation}"})
    slotted = _replaced(source, SLOTS[: len(placeholders)]), _replaced(target, slots)
    return Pair(*slotted, tuple(placeholders), keys)


def _replaced(text: str, slots: Sequence[str]) -> str:
    remaining = iter(slots)
    return MARKUP.sub(lambda match: next(remaining), text)


def restored(text: str, placeholders: Sequence[str]) -> str:
    """Puts placeholders back into their slots."""
    for slot, placeholder in zip(SLOTS, placeholders, strict=False):
        text = text.replace(slot, placeholder)
    return text


def _translations(
    packages: Sequence[str], language: str
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Source, translation, and the other number of the same message."""
    for package in packages:
        for _, entry in catalogue_entries(folder_of(package), language):
            if entry.msgstr:
                yield entry.msgid, entry.msgstr, ()
            numbers = entry.msgstr_plural
            if numbers and all(numbers.values()):
                yield entry.msgid, numbers[min(numbers)], (entry.msgid_plural,)
                yield entry.msgid_plural, numbers[max(numbers)], (entry.msgid,)

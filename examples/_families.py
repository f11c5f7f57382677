"""Splits data so that what belongs together stays together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HELD_OUT = 0.1  # to validate, and as much to test
LARGEST_HELD_OUT = 0.02  # a larger family is trained on


class Parts(NamedTuple):
    """Which items are in which part."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def families_of(keys: Sequence[Collection[str]]) -> NDArray[np.int64]:
    """The family of every item: two that share a key are of one, and so are their relatives."""
    names = {name: number for number, name in enumerate(sorted({n for own in keys for n in own}))}
    items = [item for item, own in enumerate(keys) for _ in own]
    named = [len(keys) + names[name] for own in keys for name in own]
    size = len(keys) + len(names)
    shared = coo_array((np.ones(len(items)), (items, named)), shape=(size, size))
    families: NDArray[np.int64] = connected_components(shared, directed=False)[1][: len(keys)]
    return families


def split_families(keys: Sequence[Collection[str]], seed: int) -> Parts:
    """Splits 80/10/10, with every family in one part only."""
    families = np.unique(families_of(keys), return_inverse=True)[1]
    sizes = np.bincount(families)
    order = np.random.default_rng(seed).permutation(len(sizes))
    small = order[sizes[order] <= max(1, LARGEST_HELD_OUT * len(keys))]
    reached = np.cumsum(sizes[small]) / len(keys)
    test = np.isin(families, small[reached <= HELD_OUT])
    held_out = np.isin(families, small[reached <= 2 * HELD_OUT])
    masks = ~held_out, held_out & ~test, test
    return Parts(*(np.flatnonzero(mask) for mask in masks))

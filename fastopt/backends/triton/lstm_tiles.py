"""How a step of the LSTM is cut into programs: the one table of tile sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastopt.backends.lstm_layer import Layer
from fastopt.backends.triton import launch


class Tile(NamedTuple):
    """What a program has of a step, and how it goes about it."""

    rows: int
    units: int
    depth: int
    warps: int
    stages: int


# By pass and by how factors are multiplied, the largest first. A step is too small for a card to be
# busy for long: what counts is that all multiprocessors read the weights, so a layer gets the first
# tiles of which there are enough. From 64 rows on, a Hopper multiplies by warp groups, which cannot
# take fp32 weights as the backward pass needs them. All fit into the 99 KB of shared memory that
# cards have had since 2020.
TILES: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("forward", "16 bit"): (
        Tile(128, 32, 64, 8, 3),
        Tile(64, 32, 64, 8, 4),
        Tile(64, 16, 64, 4, 4),
        Tile(32, 32, 64, 4, 4),
        Tile(64, 8, 128, 4, 4),
        Tile(16, 32, 64, 4, 4),
        Tile(32, 8, 128, 4, 4),
        Tile(16, 8, 128, 4, 4),
    ),
    ("forward", "tf32"): (
        Tile(128, 16, 32, 8, 3),
        Tile(64, 16, 32, 4, 4),
        Tile(32, 32, 32, 4, 4),
        Tile(64, 8, 64, 4, 4),
        Tile(16, 32, 32, 4, 4),
        Tile(32, 8, 64, 4, 4),
        Tile(16, 8, 64, 4, 4),
    ),
    ("forward", "exact"): (
        Tile(64, 16, 16, 8, 3),
        Tile(32, 16, 16, 4, 3),
        Tile(16, 32, 16, 4, 3),
        Tile(32, 8, 32, 4, 3),
        Tile(16, 8, 32, 4, 3),
    ),
    ("backward", "16 bit"): (
        Tile(64, 64, 64, 8, 4),
        Tile(64, 32, 64, 4, 4),
        Tile(32, 32, 128, 4, 4),
        Tile(32, 16, 128, 4, 4),
        Tile(16, 32, 128, 4, 4),
        Tile(16, 16, 128, 4, 4),
    ),
    ("backward", "tf32"): (
        Tile(32, 64, 32, 4, 4),
        Tile(32, 32, 64, 4, 4),
        Tile(32, 16, 64, 4, 4),
        Tile(16, 32, 64, 4, 4),
        Tile(16, 16, 64, 4, 4),
    ),
    ("backward", "exact"): (
        Tile(64, 64, 16, 8, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(32, 16, 32, 4, 3),
        Tile(16, 32, 32, 4, 3),
        Tile(16, 16, 64, 4, 3),
    ),
}


def tile_of(name: str, layer: Layer) -> Tile:
    """For a pass, the first that the batch fills and that are enough for most of a card."""
    arithmetic = "tf32" if layer.tf32 else "exact" if layer.dtype is torch.float32 else "16 bit"
    tiles = TILES[name, arithmetic]
    least = 3 * launch.processors(layer.device)
    for tile in tiles:
        blocks = -(-layer.hidden // tile.units) * -(-layer.batch // tile.rows) * layer.directions
        if 4 * blocks >= least and tile.rows < 2 * layer.batch:
            return tile
    return tiles[-1]

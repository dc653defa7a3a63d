"""Patterns that surfaces wear, looked up for a whole image at once.

The patterns share their edges, their contrast and their shares of light and dark, so that a window
narrower than a period says little about which one it shows: their arrangement does.

Only sums, products, comparisons and table look-ups: no sine or power whose last bit
depends on the platform, so that a seed gives the same image everywhere.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
_Grid = NDArray[np.float64]
TILE = 128
"""Side of the periodic noise tile."""
BLOB = 8
"""Tile cells across one feature."""
PERIODS = 2
"""Periods on a side of a pattern's tile: all patterns repeat after them."""
STEPS = 32
"""Cells of a pattern's tile a period."""


class Pattern(IntEnum):
    PLAIN = 0
    STRIPES = 1
    CHECKER = 2
    ZIGZAG = 3
    BRICKS = 4
    SQUARES = 5
    DISCS = 6


def noise_tile(rng: np.random.Generator) -> Floats:
    """Smooth periodic noise, (TILE, TILE) in -1..1, with features BLOB cells wide."""
    cells = TILE // BLOB
    coarse = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
    wrapped = np.pad(coarse, 1, mode="wrap")
    smooth = Image.fromarray(wrapped).resize(
        (TILE, TILE), Image.Resampling.BICUBIC, box=(1, 1, cells + 1, cells + 1)
    )
    return np.asarray(smooth, dtype=np.float32) / 127.5 - 1


def sample_noise(tile: Floats, u: Floats, v: Floats) -> Floats:
    """The tile's noise at (u, v), in features."""
    columns = (u * BLOB).astype(np.int32) % TILE
    rows = (v * BLOB).astype(np.int32) % TILE
    return tile[rows, columns]


def sample_patterns(pattern: NDArray[np.uint8], u: Floats, v: Floats) -> Floats:
    """-1, 0 or 1 at each pixel's pattern and position (u, v), in periods; all arrays are (h, w)."""
    side = PERIODS * STEPS
    columns = np.floor(u * STEPS).astype(np.int32) % side
    rows = np.floor(v * STEPS).astype(np.int32) % side
    return _ATLAS[pattern, rows, columns]


def _triangle(t: _Grid) -> _Grid:
    return 4 * np.abs(t - np.floor(t + 0.5)) - 1


def _square(t: _Grid) -> _Grid:
    """-1 in the first half of each period, 1 in the second."""
    return np.where(t - np.floor(t) < 0.5, -1.0, 1.0)


def _from_centre(t: _Grid) -> _Grid:
    """Distance to the nearest even number: 0 to 1."""
    return np.abs(t - 2 * np.floor(t / 2 + 0.5))


def _atlas() -> Floats:
    """One tile a pattern, (patterns, side, side)."""
    cells = (np.arange(PERIODS * STEPS) + 0.5) / STEPS
    v, u = np.meshgrid(cells, cells, indexing="ij")
    x, y = _from_centre(u), _from_centre(v)
    staggered = np.minimum(x * x + y * y, (1 - x) * (1 - x) + (1 - y) * (1 - y))
    tiles = {
        Pattern.PLAIN: np.zeros_like(u),
        Pattern.STRIPES: _square(u),
        Pattern.CHECKER: _square(u) * _square(v),
        # Edges at 45 degrees to the axes, corners of 90 degrees.
        Pattern.ZIGZAG: _square(u + 0.5 * _triangle(v / 2)),
        Pattern.BRICKS: _square(u + 0.25 * _square(v / 2)),
        # Islands that cover half of the tile.
        Pattern.SQUARES: np.where(np.maximum(x * x, y * y) < 0.5, 1.0, -1.0),
        Pattern.DISCS: np.where(staggered < 1 / np.pi, 1.0, -1.0),
    }
    return np.stack([tiles[pattern] for pattern in Pattern]).astype(np.float32)


_ATLAS = _atlas()

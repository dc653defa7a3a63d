"""Patterns that surfaces wear, evaluated for a whole image at once.

Only sums, products, comparisons and table look-ups: no sine or power whose last bit depends on the
platform, so that a seed gives the same image everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from lgcnet_fast.data.painting.camera import EYE, Camera

Floats = NDArray[np.float32]
TILE = 128
"""Side of the periodic noise tile."""
BLOB = 8
"""Tile cells across one feature."""


class Pattern(IntEnum):
    PLAIN = 0
    STRIPES = 1
    CHECKER = 2
    WINDOWS = 3
    BRICKS = 4
    BLOBS = 5
    ZIGZAG = 6


class Frame(IntEnum):
    """The plane that a texture lies in: facing the camera, the ground, or along the street."""

    FRONT = 0
    GROUND = 1
    SIDE = 2


@dataclass(frozen=True)
class Texture:
    """A pattern with its period in metres along both axes of its plane."""

    pattern: Pattern = Pattern.PLAIN
    period: tuple[float, float] = (1.0, 1.0)
    contrast: float = 0.0
    tilt: tuple[float, float] = (1.0, 0.0)
    """Direction of the first axis; not normalised."""


@dataclass(frozen=True)
class Coordinates:
    """Position and pixel footprint of every pixel in each frame, (3, h, w) each."""

    first: Floats
    second: Floats
    footprint: Floats


def frame_coordinates(camera: Camera) -> Coordinates:
    """FRONT: pixels. GROUND: metres (x, z). SIDE: (z, y) of a plane one metre to the side."""
    shape = (camera.height, camera.width)
    columns = np.arange(camera.width, dtype=np.float32)[None, :]
    rows = np.arange(camera.height, dtype=np.float32)[:, None]
    below = np.maximum(np.abs(rows - np.float32(camera.horizon)), 0.5)
    aside = np.maximum(np.abs(columns - np.float32(camera.vanish)), 0.5)
    ground_z = EYE * camera.focal / below
    side_z = camera.focal / aside
    first = (columns, (columns - camera.vanish) * (EYE / below), side_z)
    second = (rows, ground_z, (camera.horizon - rows) / aside)
    footprint = (np.float32(1), ground_z**2 / (EYE * camera.focal), side_z**2 / camera.focal)
    return Coordinates(*(_stack(parts, shape) for parts in (first, second, footprint)))


def _stack(parts: tuple[ArrayLike, ...], shape: tuple[int, int]) -> Floats:
    return np.stack([np.broadcast_to(part, shape) for part in parts]).astype(np.float32)


def noise_tile(rng: np.random.Generator) -> Floats:
    """Smooth periodic noise, (TILE, TILE) in -1..1, with features BLOB cells wide."""
    cells = TILE // BLOB
    coarse = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
    wrapped = np.pad(coarse, 1, mode="wrap")
    smooth = Image.fromarray(wrapped).resize(
        (TILE, TILE), Image.Resampling.BICUBIC, box=(1, 1, cells + 1, cells + 1)
    )
    return np.asarray(smooth, dtype=np.float32) / 127.5 - 1


def sample(tile: Floats, u: Floats, v: Floats) -> Floats:
    """The tile's noise at (u, v), in features."""
    columns = (u * BLOB).astype(np.int32) % TILE
    rows = (v * BLOB).astype(np.int32) % TILE
    return tile[rows, columns]


def evaluate(pattern: NDArray[np.uint8], u: Floats, v: Floats, tile: Floats) -> Floats:
    """Value in -1..1 of each pixel's pattern at (u, v), in periods; all arrays are (h, w)."""
    value = np.zeros_like(u)
    for kind, function in _FUNCTIONS.items():
        chosen = np.flatnonzero(pattern == kind)
        if chosen.size:
            value.flat[chosen] = function(u.flat[chosen], v.flat[chosen], tile)
    return value


def _triangle(t: Floats) -> Floats:
    return 4 * np.abs(t - np.floor(t + np.float32(0.5))) - 1


def _stripes(u: Floats, v: Floats, tile: Floats) -> Floats:
    return np.clip(2 * _triangle(u), -1, 1)


def _checker(u: Floats, v: Floats, tile: Floats) -> Floats:
    return np.clip(4 * _triangle(u) * _triangle(v), -1, 1)


def _windows(u: Floats, v: Floats, tile: Floats) -> Floats:
    return np.where(np.maximum(_triangle(u), _triangle(v)) < 0, np.float32(-1), np.float32(0.3))


def _bricks(u: Floats, v: Floats, tile: Floats) -> Floats:
    row = np.floor(v + np.float32(0.5))
    across = u + np.float32(0.5) * (row - 2 * np.floor(row / 2))
    mortar = np.maximum(_triangle(across) - np.float32(0.1), _triangle(v))
    return np.where(mortar > np.float32(0.65), np.float32(-1), np.float32(0.35))


def _blobs(u: Floats, v: Floats, tile: Floats) -> Floats:
    return np.clip(1.8 * sample(tile, u, v), -1, 1)


def _zigzag(u: Floats, v: Floats, tile: Floats) -> Floats:
    return np.clip(2 * _triangle(u + np.float32(0.4) * _triangle(v)), -1, 1)


_FUNCTIONS = {
    Pattern.STRIPES: _stripes,
    Pattern.CHECKER: _checker,
    Pattern.WINDOWS: _windows,
    Pattern.BRICKS: _bricks,
    Pattern.BLOBS: _blobs,
    Pattern.ZIGZAG: _zigzag,
}

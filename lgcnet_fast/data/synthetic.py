"""Built-in street scenes with the 19 Cityscapes classes: procedural, seeded, no files.

Classes share their colours, and what a few pixels show. Surfaces differ in how equal elements are
arranged over tens of pixels, objects in their shape; fine streaks and noise cover both. So a
network needs filters between the first layers and the last: `DIFFICULTY` sets how badly.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lgcnet_fast.data.classes import CITYSCAPES
from lgcnet_fast.data.dataset import SegmentationDataset
from lgcnet_fast.data.painting.camera import Camera
from lgcnet_fast.data.painting.canvas import Canvas, Difficulty
from lgcnet_fast.data.painting.scene import paint_street
from lgcnet_fast.errors import DataError

DIFFICULTY = Difficulty()
SMALLEST = 16
"""Shortest side of a scene that still shows something, pixels."""


class SyntheticStreets(SegmentationDataset):
    """`count` scenes of `size` (height, width); scene i depends on (seed, split, i, size) only.

    Raises `DataError` for a negative seed or index, a count below one and a size below 16 pixels.
    """

    name = "synthetic"
    classes = CITYSCAPES

    def __init__(self, split: str, count: int, size: tuple[int, int], seed: int) -> None:
        check_request("data.synthetic", count, min(size), seed)
        self.split = split
        self.count = count
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def stem(self, index: int) -> str:
        return f"{self.split}_{self._checked(index):05d}"

    def image(self, index: int) -> NDArray[np.uint8]:
        return self._scene(index)[0].copy()

    def label(self, index: int) -> NDArray[np.uint8]:
        return self._scene(index)[1].copy()

    def _scene(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return _paint(self.seed, self.split, self._checked(index), self.size, DIFFICULTY)

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise DataError(f"synthetic {self.split}: no scene {index}, there are {self.count}")
        return index


def scene_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The same stream on every platform: PCG64 seeded by whole numbers."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(split.encode()), index]))


def check_request(where: str, count: int, shortest: int, seed: int) -> None:
    """Raises `DataError` naming the value that no scene can be painted with."""
    if count < 1:
        raise DataError(f"{where}: {count} images asked for; give at least 1")
    if shortest < SMALLEST:
        raise DataError(f"{where}: {shortest} pixels are too few; give at least {SMALLEST}")
    if seed < 0:
        raise DataError(f"{where}: the seed is {seed}; give 0 or more")


# Image and label of a scene are usually asked for one after the other.
@lru_cache(maxsize=8)
def _paint(
    seed: int, split: str, index: int, size: tuple[int, int], difficulty: Difficulty
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = scene_generator(seed, split, index)
    height, width = size
    camera = Camera(
        height=height,
        width=width,
        horizon=height * (0.4 + 0.12 * float(rng.random())),
        vanish=width * (0.36 + 0.28 * float(rng.random())),
        focal=height * (0.95 + 0.3 * float(rng.random())),
    )
    canvas = Canvas(camera, rng, difficulty)
    paint_street(canvas)
    return canvas.render()

"""A canvas on which shapes are painted as surfaces; colours and labels follow at the end.

Shapes only write the index of their surface. `render` then shades every pixel once, which is
what makes a scene of a hundred textured shapes cheap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lgcnet_fast.data.painting.camera import Camera, Point
from lgcnet_fast.data.painting.textures import (
    PERIODS,
    Floats,
    Pattern,
    noise_tile,
    sample_noise,
    sample_patterns,
)

Colour = tuple[float, float, float]
"""Red, green and blue, 0..255."""


class Street(IntEnum):
    """Train ids of Cityscapes."""

    ROAD = 0
    SIDEWALK = 1
    BUILDING = 2
    WALL = 3
    FENCE = 4
    POLE = 5
    TRAFFIC_LIGHT = 6
    TRAFFIC_SIGN = 7
    VEGETATION = 8
    TERRAIN = 9
    SKY = 10
    PERSON = 11
    RIDER = 12
    CAR = 13
    TRUCK = 14
    BUS = 15
    TRAIN = 16
    MOTORCYCLE = 17
    BICYCLE = 18
    VOID = 255


@dataclass(frozen=True)
class Difficulty:
    """How little colour and the nearest few pixels say."""

    colour_swap: float = 1.0
    """Share of surfaces whose colour comes from the palette shared by all classes."""
    contrast: tuple[float, float] = (0.35, 0.6)
    """Range of the contrast of the patterns that tell surfaces apart."""
    period: tuple[float, float] = (30.0, 50.0)
    """Range of their periods in an image 256 pixels high, pixels."""
    grain: float = 0.1
    """Largest contrast of the fine streaks that every surface has, whatever its class."""
    noise: float = 8.0
    """Largest amplitude of the sensor noise, grey levels."""
    blur: float = 0.9
    """Largest blur radius in an image 256 pixels high, pixels."""
    cast: float = 0.06
    """Largest relative colour cast of a channel."""
    light: float = 0.2
    """Largest relative loss of exposure, twice the largest gain."""


@dataclass(frozen=True)
class _Surface:
    label: int
    colour: Colour
    pattern: Pattern
    axis: tuple[float, float]
    """Periods a pixel along columns and rows; the pattern's other axis is perpendicular."""
    phase: tuple[float, float]
    contrast: float
    """Negative: light and dark swap places."""
    grain: tuple[float, float, float]
    """Features a pixel along columns and rows, and contrast."""


class Canvas:
    """Painters draw on it in order of decreasing depth; `rng` decides everything random."""

    def __init__(self, camera: Camera, rng: np.random.Generator, difficulty: Difficulty) -> None:
        self.camera = camera
        self.rng = rng
        self.difficulty = difficulty
        size = (camera.width, camera.height)
        self._index = Image.new("I", size, 0)
        self._light = Image.new("L", size, 255)
        self._index_draw = ImageDraw.Draw(self._index)
        self._light_draw = ImageDraw.Draw(self._light)
        self._surfaces: list[_Surface] = []

    # -- random choices -----------------------------------------------------------------------

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def chance(self, probability: float) -> bool:
        return float(self.rng.random()) < probability

    def side(self) -> int:
        """-1 (left) or 1 (right)."""
        return -1 if self.chance(0.5) else 1

    # -- painting -------------------------------------------------------------------------------

    def surface(self, label: Street, colour: Colour, pattern: Pattern = Pattern.PLAIN) -> int:
        """Registers a surface and returns its index.

        Patterns lie in the image plane, turned at random: they stay readable at every distance.
        """
        phase = (self.uniform(0, PERIODS), self.uniform(0, PERIODS))
        contrast = self.side() * self.uniform(*self.difficulty.contrast)
        surface = _Surface(
            int(label), colour, pattern, self._axis(), phase, contrast, self._grain()
        )
        self._surfaces.append(surface)
        return len(self._surfaces) - 1

    def _axis(self) -> tuple[float, float]:
        """A random direction, and a random period."""
        x, y = self.uniform(-1, 1), self.uniform(-1, 1)
        length = max(math.sqrt(x * x + y * y), 1e-6)
        unit = 256 / self.camera.height / self.uniform(*self.difficulty.period)
        return unit * x / length, unit * y / length

    def _grain(self) -> tuple[float, float, float]:
        """Features 3 to 12 pixels long on each axis, in an image 256 pixels high."""
        unit = 256 / self.camera.height
        contrast = self.uniform(0, self.difficulty.grain)
        return unit / self.uniform(3, 12), unit / self.uniform(3, 12), contrast

    def polygon(self, points: Sequence[Point], surface: int, light: float = 1.0) -> None:
        self._index_draw.polygon(points, fill=surface)
        self._light_draw.polygon(points, fill=round(255 * light))

    def rectangle(self, corner: Point, opposite: Point, surface: int, light: float = 1.0) -> None:
        box = _ordered(corner, opposite)
        self._index_draw.rectangle(box, fill=surface)
        self._light_draw.rectangle(box, fill=round(255 * light))

    def ellipse(self, corner: Point, opposite: Point, surface: int, light: float = 1.0) -> None:
        box = _ordered(corner, opposite)
        self._index_draw.ellipse(box, fill=surface)
        self._light_draw.ellipse(box, fill=round(255 * light))

    def line(self, points: Sequence[Point], surface: int, width: float) -> None:
        pixels = max(1, round(width))
        self._index_draw.line(points, fill=surface, width=pixels)
        self._light_draw.line(points, fill=255, width=pixels)

    def shadow(self, points: Sequence[Point], light: float) -> None:
        """Darkens what was painted so far; changes no label."""
        self._light_draw.polygon(points, fill=round(255 * light))

    # -- result -----------------------------------------------------------------------------------

    def render(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The image, uint8 (h, w, 3) RGB, and the train ids, uint8 (h, w)."""
        index = np.asarray(self._index)
        labels = np.array([surface.label for surface in self._surfaces], dtype=np.uint8)
        colours = np.array([surface.colour for surface in self._surfaces], dtype=np.float32)
        light = np.asarray(self._light, dtype=np.float32) / 255
        tile = noise_tile(self.rng)
        relief = 1 + self._patterns(index) + self._streaks(index, tile)
        return self._expose(colours[index] * (light * relief)[..., None]), labels[index]

    def _patterns(self, index: NDArray[np.int32]) -> Floats:
        worn = [(*s.axis, *s.phase, s.contrast) for s in self._surfaces]
        a, b, u0, v0, contrast = (column[index] for column in np.array(worn, dtype=np.float32).T)
        patterns = np.array([s.pattern for s in self._surfaces], dtype=np.uint8)[index]
        rows, columns = self._pixels()
        u, v = a * columns + b * rows + u0, a * rows - b * columns + v0
        return contrast * sample_patterns(patterns, u, v)

    def _streaks(self, index: NDArray[np.int32], tile: Floats) -> Floats:
        grain = np.array([surface.grain for surface in self._surfaces], dtype=np.float32)
        across, down, contrast = (column[index] for column in grain.T)
        rows, columns = self._pixels()
        return contrast * sample_noise(tile, across * columns, down * rows)

    def _pixels(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Row and column numbers that broadcast to the image."""
        return np.arange(self.camera.height)[:, None], np.arange(self.camera.width)[None, :]

    def _expose(self, radiance: Floats) -> NDArray[np.uint8]:
        d = self.difficulty
        height, width = self.camera.height, self.camera.width
        gain = 1 + self.uniform(-d.light, d.light / 2)
        cast = [gain * (1 + self.uniform(-d.cast, d.cast)) for _ in range(3)]
        slope = self.uniform(-d.light, d.light)
        ramp = 1 + slope * (np.arange(width, dtype=np.float32) / width - np.float32(0.5))
        radiance *= ramp[None, :, None] * np.array(cast, dtype=np.float32)
        image = Image.fromarray(np.clip(radiance, 0, 255).astype(np.uint8))
        blurred = image.filter(ImageFilter.BoxBlur(self.uniform(0, d.blur) * height / 256))
        amplitude = self.uniform(0.2, 1) * d.noise / 128
        grain = self.rng.integers(0, 256, (height, width, 1), dtype=np.uint8).astype(np.float32)
        noisy = np.asarray(blurred, dtype=np.float32) + (grain - 128) * np.float32(amplitude)
        return np.clip(noisy, 0, 255).astype(np.uint8)


def _ordered(corner: Point, opposite: Point) -> tuple[Point, Point]:
    left, right = sorted((corner[0], opposite[0]))
    top, bottom = sorted((corner[1], opposite[1]))
    return (left, top), (right, bottom)

"""Built-in pictures of single objects, by the painters of the street scenes: for pretraining."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lgcnet_fast.data.class_folder import ClassificationDataset
from lgcnet_fast.data.painting import furniture, people, scenery, vehicles
from lgcnet_fast.data.painting.camera import EYE, Camera
from lgcnet_fast.data.painting.canvas import Canvas, Street
from lgcnet_fast.data.synthetic import DIFFICULTY, check_request, scene_generator
from lgcnet_fast.errors import DataError

Painter = Callable[[Canvas, float, float], None]


def _panel(label: Street, height: float) -> Painter:
    def paint(canvas: Canvas, x: float, z: float) -> None:
        half = height * canvas.uniform(0.5, 1.2)
        scenery.panel(canvas, label, x - half, x + half, height * canvas.uniform(0.8, 1), z)

    return paint


def _mounted(motorised: bool) -> Painter:
    return lambda canvas, x, z: people.rider(canvas, x, z, motorised)


def _two_wheeler(painter: Callable[[Canvas, float, float, int], None]) -> Painter:
    return lambda canvas, x, z: painter(canvas, x, z, canvas.side())


_OBJECTS: dict[str, tuple[Painter, float]] = {
    "bicycle": (_two_wheeler(people.bicycle), 1.2),
    "building": (_panel(Street.BUILDING, 9.0), 9.0),
    "bus": (vehicles.bus, 3.4),
    "car": (vehicles.car, 2.2),
    "cyclist": (_mounted(False), 2.0),
    "fence": (_panel(Street.FENCE, 1.8), 2.0),
    "motorcycle": (_two_wheeler(people.motorcycle), 1.3),
    "motorcyclist": (_mounted(True), 2.0),
    "person": (people.person, 2.0),
    "traffic light": (furniture.traffic_light, 4.6),
    "traffic sign": (furniture.traffic_sign, 3.6),
    "train": (vehicles.train, 4.2),
    "tree": (scenery.tree, 6.5),
    "truck": (vehicles.truck, 3.8),
    "wall": (_panel(Street.WALL, 2.4), 2.6),
}
"""Painter of each class and the height in metres that the picture should hold."""


class SyntheticClasses(ClassificationDataset):
    """`count` square pictures of `size` pixels; picture i depends on (seed, split, i, size) only.

    Classes take turns, so that every class has its share of any prefix. Raises `DataError`.
    """

    name = "synthetic classes"
    classes = tuple(_OBJECTS)

    def __init__(self, split: str, count: int, size: int, seed: int) -> None:
        check_request("pretrain.synthetic", count, size, seed)
        self.split = split
        self.count = count
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def target(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise DataError(f"{self.name} {self.split}: no picture {index}, there are {self.count}")
        return index % len(self.classes)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB uint8 (size, size, 3)."""
        painter, tall = _OBJECTS[self.classes[self.target(index)]]
        rng = scene_generator(self.seed, f"classes {self.split}", index)
        # The camera tilts so that the object, whatever its size, fills most of the height.
        z = 4.0 + 8.0 * float(rng.random())
        scale = (0.7 + 0.3 * float(rng.random())) * self.size / tall
        horizon = (0.88 + 0.1 * float(rng.random())) * self.size - EYE * scale
        canvas = Canvas(
            Camera(self.size, self.size, horizon, self.size * 0.5, scale * z), rng, DIFFICULTY
        )
        scenery.sky(canvas)
        scenery.skyline(canvas)
        if canvas.chance(0.6):
            scenery.strip(canvas, -30, 30, Street.ROAD)
        painter(canvas, canvas.uniform(-0.12, 0.12) * tall, z)
        return canvas.render()[0]

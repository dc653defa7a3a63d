"""Composes a street: scenery first, then everything on the ground from far to near."""

from __future__ import annotations

from collections.abc import Callable

from lgcnet_fast.data.painting import furniture, people, scenery, vehicles
from lgcnet_fast.data.painting.canvas import Canvas, Street

Placed = tuple[float, Callable[[], None]]
"""Depth of an object and what paints it."""

VEHICLES: dict[Street, tuple[Callable[[Canvas, float, float], None], float]] = {
    Street.CAR: (vehicles.car, 0.95),
    Street.TRUCK: (vehicles.truck, 0.62),
    Street.BUS: (vehicles.bus, 0.62),
    Street.TRAIN: (vehicles.train, 0.6),
}
"""Painter and share of the images that hold one."""
ACROSS = 0.35
"""Share of vehicles that cross the street, seen in profile."""
BARRIERS = (Street.WALL, Street.FENCE, Street.VEGETATION)


def paint_street(canvas: Canvas) -> None:
    left, right = canvas.uniform(2.6, 4.2), canvas.uniform(2.6, 4.2)
    verge = canvas.uniform(2.2, 4.0)
    scenery.sky(canvas)
    scenery.skyline(canvas)
    scenery.ground(canvas, (-left, right), (-left - verge, right + verge))
    for side, kerb in ((-1, left), (1, right)):
        _roadside(canvas, side, kerb, verge)
    _ground_shadows(canvas)
    placed = [*_vehicles(canvas), *_beside_the_road(canvas, left, right, verge), *_riders(canvas)]
    for _, paint in sorted(placed, key=lambda one: -one[0]):
        paint()
    if canvas.chance(0.35):
        furniture.bonnet(canvas)


def _roadside(canvas: Canvas, side: int, kerb: float, verge: float) -> None:
    """A far row of buildings and trees, a near row of walls, fences and hedges, a grass strip."""
    edge = kerb + verge
    _row(
        canvas,
        side * (edge + canvas.uniform(1.5, 4)),
        (Street.BUILDING,) * 3 + BARRIERS[2:],
        gap=0.15,
    )
    _row(canvas, side * (edge + canvas.uniform(0.1, 0.8)), BARRIERS, gap=0.3)
    if canvas.chance(0.45):
        inner, outer = sorted((side * kerb, side * (kerb + canvas.uniform(0.7, 1.3))))
        scenery.strip(canvas, inner, outer, Street.TERRAIN)


def _row(canvas: Canvas, x: float, labels: tuple[Street, ...], gap: float) -> None:
    segments = []
    z = canvas.uniform(4, 7)
    while z < 55:
        length = canvas.uniform(5, 13)
        label = labels[int(canvas.rng.integers(0, len(labels)))]
        if not canvas.chance(gap):
            segments.append((z, z + length, label))
        z += length
    for near, far, label in reversed(segments):
        scenery.facade(canvas, x, near, far, label, _height(canvas, label, len(labels) > 3))


def _height(canvas: Canvas, label: Street, far_row: bool) -> float:
    if label == Street.BUILDING:
        return canvas.uniform(4.5, 15)
    if label == Street.WALL:
        return canvas.uniform(1.6, 3.2)
    if label == Street.FENCE:
        return canvas.uniform(1.2, 2.4)
    return canvas.uniform(3, 7) if far_row else canvas.uniform(0.8, 2.6)


def _ground_shadows(canvas: Canvas) -> None:
    for _ in range(int(canvas.rng.integers(0, 4))):
        z, x = canvas.uniform(4, 20), canvas.uniform(-6, 3)
        right, far = x + canvas.uniform(1, 6), z + canvas.uniform(1, 5)
        scenery.shadow_on_ground(canvas, x, right, z, far, canvas.uniform(0.45, 0.8))


def _vehicles(canvas: Canvas) -> list[Placed]:
    placed: list[Placed] = []
    for label, (painter, share) in VEHICLES.items():
        if not canvas.chance(share):
            continue
        if canvas.chance(ACROSS):
            z, x = canvas.uniform(10, 20), canvas.uniform(-7, 7)
            placed.append((z, _later(vehicles.profile, canvas, label, x, z)))
        else:
            z, x = canvas.uniform(7, 17), canvas.side() * canvas.uniform(1.5, 3.2)
            placed.append((z, _later(painter, canvas, x, z)))
    for _ in range(int(canvas.rng.integers(1, 5))):
        z, x = canvas.uniform(5, 16), canvas.side() * canvas.uniform(1.8, 3.6)
        placed.append((z, _later(vehicles.car, canvas, x, z)))
    return placed


def _riders(canvas: Canvas) -> list[Placed]:
    placed: list[Placed] = []
    for motorised in (False, True):
        for _ in range(2):
            if canvas.chance(0.45):
                z, x = canvas.uniform(3.6, 8), canvas.uniform(-2.8, 2.8)
                placed.append((z, _later(people.rider, canvas, x, z, motorised)))
    return placed


def _beside_the_road(canvas: Canvas, left: float, right: float, verge: float) -> list[Placed]:
    placed: list[Placed] = []

    def scatter(
        painter: Callable[..., None],
        most: int,
        near: float,
        far: float,
        inset: tuple[float, float],
        *details: object,
    ) -> None:
        """Up to `most` on the sidewalks, between two shares of the sidewalk's width."""
        for _ in range(int(canvas.rng.integers(0, most + 1))):
            z, side = canvas.uniform(near, far), canvas.side()
            x = side * ((left if side < 0 else right) + canvas.uniform(*inset) * verge)
            placed.append((z, _later(painter, canvas, x, z, *details)))

    scatter(furniture.lamp_post, 3, 7, 22, (0.0, 0.2))
    scatter(furniture.traffic_light, 4, 5, 11, (-0.4, 0.3))
    scatter(furniture.traffic_sign, 4, 5, 10, (-0.3, 0.5))
    scatter(people.person, 5, 4, 10, (-0.2, 0.8))
    scatter(people.bicycle, 2, 4, 8, (-0.1, 0.7), canvas.side())
    scatter(people.motorcycle, 2, 4, 9, (-0.3, 0.7), canvas.side())
    scatter(scenery.tree, 2, 8, 25, (0.1, 1.4))
    scatter(furniture.unlabelled_box, 1, 7, 18, (0.1, 0.9))
    if canvas.chance(0.3):
        z, x = canvas.uniform(4, 10), canvas.uniform(-2, 2)
        placed.append((z, _later(people.person, canvas, x, z)))
    return placed


def _later(painter: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: painter(*arguments)

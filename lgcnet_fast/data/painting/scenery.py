"""What does not move: sky, ground, the rows of buildings, walls, fences and hedges, trees."""

from __future__ import annotations

from lgcnet_fast.data.painting import palette
from lgcnet_fast.data.painting.camera import Point
from lgcnet_fast.data.painting.canvas import Canvas, Street
from lgcnet_fast.data.painting.textures import Pattern

FAR = 90.0
"""Depth where the street ends, metres."""

WORN = {
    Street.ROAD: Pattern.PLAIN,
    Street.SIDEWALK: Pattern.CHECKER,
    Street.BUILDING: Pattern.SQUARES,
    Street.WALL: Pattern.BRICKS,
    Street.FENCE: Pattern.STRIPES,
    Street.VEGETATION: Pattern.ZIGZAG,
    Street.TERRAIN: Pattern.DISCS,
}
"""The patterns that tell the surfaces of a street apart."""


def sky(canvas: Canvas) -> None:
    camera = canvas.camera
    surface = canvas.surface(Street.SKY, palette.air(canvas))
    canvas.rectangle((0, 0), (camera.width, camera.height), surface)


def skyline(canvas: Canvas) -> None:
    """Distant blocks and trees on the horizon."""
    camera = canvas.camera
    x = -FAR
    while x < FAR:
        width = canvas.uniform(6, 22)
        if canvas.chance(0.6):
            panel(canvas, Street.BUILDING, x, x + width, canvas.uniform(5, 22), FAR)
        else:
            tree_row(canvas, x, x + width, canvas.uniform(3, 9), FAR)
        x += width
    haze = canvas.surface(Street.TERRAIN, palette.leaf(canvas), WORN[Street.TERRAIN])
    canvas.rectangle((0, round(camera.horizon)), (camera.width, camera.height), haze)


def panel(
    canvas: Canvas, label: Street, left: float, right: float, height: float, z: float
) -> None:
    """A building, wall or fence that faces the camera."""
    surface = canvas.surface(label, palette.stone(canvas), WORN[label])
    project = canvas.camera.project
    canvas.rectangle(project(left, height, z), project(right, 0, z), surface)


def tree_row(canvas: Canvas, left: float, right: float, height: float, z: float) -> None:
    """Bushes that face the camera."""
    surface = canvas.surface(Street.VEGETATION, palette.leaf(canvas), WORN[Street.VEGETATION])
    project = canvas.camera.project
    steps = 4
    for step in range(steps):
        x = left + (right - left) * (step + 0.5) / steps
        radius = (right - left) / steps * canvas.uniform(0.6, 1.0)
        top = height * canvas.uniform(0.7, 1.0)
        canvas.ellipse(project(x - radius, top, z), project(x + radius, -top / 2, z), surface)


def ground(canvas: Canvas, kerb: tuple[float, float], verge: tuple[float, float]) -> None:
    """Sidewalks from the kerbs to the verges (left, right; metres), the road in between."""
    strip(canvas, verge[0], verge[1], Street.SIDEWALK)
    strip(canvas, kerb[0], kerb[1], Street.ROAD)
    marking = canvas.surface(Street.ROAD, (205.0, 203.0, 190.0))
    for lane in (-1.75, 1.75):
        if canvas.chance(0.7):
            dashes(canvas, lane, marking)
    if canvas.chance(0.3):
        crossing(canvas, canvas.uniform(7, 14), kerb, marking)


def strip(
    canvas: Canvas,
    left: float,
    right: float,
    label: Street,
    near: float = 1.0,
    far: float = FAR,
) -> None:
    """A band of ground between two lines along the street."""
    family = palette.leaf if label == Street.TERRAIN else palette.stone
    surface = canvas.surface(label, family(canvas), WORN[label])
    canvas.polygon(_flat(canvas, left, right, near, far), surface)


def dashes(canvas: Canvas, x: float, surface: int) -> None:
    z = canvas.uniform(2.5, 6)
    while z < 40:
        canvas.polygon(_flat(canvas, x - 0.09, x + 0.09, z, z + 3), surface)
        z += 6


def crossing(canvas: Canvas, z: float, kerb: tuple[float, float], surface: int) -> None:
    x = kerb[0] + 0.3
    while x < kerb[1] - 0.5:
        canvas.polygon(_flat(canvas, x, x + 0.5, z, z + 3), surface)
        x += 1.0


def shadow_on_ground(
    canvas: Canvas, left: float, right: float, near: float, far: float, light: float
) -> None:
    canvas.shadow(_flat(canvas, left, right, near, far), light)


def facade(canvas: Canvas, x: float, near: float, far: float, label: Street, height: float) -> None:
    """An upright plane along the street at lateral position `x`, and its end that faces us."""
    family = palette.leaf if label == Street.VEGETATION else palette.stone
    colour, pattern = family(canvas), WORN[label]
    project = canvas.camera.project
    if label == Street.VEGETATION:
        _ragged_top(canvas, x, near, far, height, colour)
    else:
        depth = 9.0 if label == Street.BUILDING else 0.3
        outer = x + depth * (1 if x > 0 else -1)
        end = canvas.surface(label, colour, pattern)
        canvas.rectangle(project(x, height, near), project(outer, 0, near), end)
    along = canvas.surface(label, colour, pattern)
    corners = [(near, 0.0), (near, height), (far, height), (far, 0.0)]
    canvas.polygon([project(x, y, z) for z, y in corners], along, light=canvas.uniform(0.6, 1))


def _ragged_top(
    canvas: Canvas, x: float, near: float, far: float, height: float, colour: palette.Colour
) -> None:
    crown = canvas.surface(Street.VEGETATION, colour, WORN[Street.VEGETATION])
    z = far
    while z > near:
        radius = canvas.uniform(0.3, 0.5) * min(height, 2.5)
        left, top = canvas.camera.project(x - radius, height + radius * 0.6, z)
        right, bottom = canvas.camera.project(x + radius, height - radius, z)
        canvas.ellipse((left, top), (right, bottom), crown)
        z -= max(radius, (far - near) / 24)


def tree(canvas: Canvas, x: float, z: float) -> None:
    camera = canvas.camera
    height, radius = canvas.uniform(3.5, 6.5), canvas.uniform(1.0, 1.9)
    scale = 1 / camera.scale(z)
    trunk = canvas.surface(Street.VEGETATION, palette.stone(canvas))
    canvas.line(
        [camera.project(x, 0, z), camera.project(x, height - radius, z)], trunk, 0.3 / scale
    )
    crown = canvas.surface(Street.VEGETATION, palette.leaf(canvas), WORN[Street.VEGETATION])
    for _ in range(5):
        dx, dy = canvas.uniform(-0.6, 0.6) * radius, canvas.uniform(-0.5, 0.5) * radius
        part = radius * canvas.uniform(0.6, 0.9)
        canvas.ellipse(
            camera.project(x + dx - part, height + dy + part, z),
            camera.project(x + dx + part, height + dy - part, z),
            crown,
            light=canvas.uniform(0.75, 1),
        )


def _flat(canvas: Canvas, left: float, right: float, near: float, far: float) -> list[Point]:
    project = canvas.camera.project
    return [
        project(left, 0, near),
        project(left, 0, far),
        project(right, 0, far),
        project(right, 0, near),
    ]

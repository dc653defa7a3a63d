"""Poles, traffic lights, traffic signs, and boxes that belong to no class."""

from __future__ import annotations

from lgcnet_fast.data.painting import palette
from lgcnet_fast.data.painting.canvas import Canvas, Street


def pole(canvas: Canvas, x: float, z: float, height: float) -> None:
    camera = canvas.camera
    surface = canvas.surface(Street.POLE, palette.stone(canvas))
    width = canvas.uniform(0.14, 0.26) * camera.scale(z)
    canvas.line([camera.project(x, 0, z), camera.project(x, height, z)], surface, width)


def lamp_post(canvas: Canvas, x: float, z: float) -> None:
    """A tall pole with an arm over the road."""
    camera = canvas.camera
    height = canvas.uniform(5, 8)
    pole(canvas, x, z, height)
    arm = canvas.surface(Street.POLE, palette.stone(canvas))
    reach = x - 1.8 * (1 if x > 0 else -1)
    canvas.line(
        [camera.project(x, height, z), camera.project(reach, height + 0.3, z)],
        arm,
        0.14 * camera.scale(z),
    )


def traffic_light(canvas: Canvas, x: float, z: float) -> None:
    camera = canvas.camera
    top = canvas.uniform(3.4, 4.6)
    pole(canvas, x, z, top)
    half = canvas.uniform(0.22, 0.3)
    housing = canvas.surface(
        Street.TRAFFIC_LIGHT, palette.darker(palette.stone(canvas), canvas.uniform(0.35, 0.8))
    )
    canvas.rectangle(
        camera.project(x - half, top, z), camera.project(x + half, top - 5 * half, z), housing
    )
    lit = int(canvas.rng.integers(0, 3))
    for lamp, colour in enumerate(palette.LAMPS):
        glow = canvas.surface(
            Street.TRAFFIC_LIGHT, colour if lamp == lit else palette.darker(colour, 0.35)
        )
        y = top - half * (0.9 + 1.6 * lamp)
        radius = 0.65 * half
        canvas.ellipse(
            camera.project(x - radius, y + radius, z),
            camera.project(x + radius, y - radius, z),
            glow,
        )


def traffic_sign(canvas: Canvas, x: float, z: float) -> None:
    """A disc, triangle or board with a rim and a symbol."""
    camera = canvas.camera
    y, radius = canvas.uniform(2.2, 3.4), canvas.uniform(0.4, 0.65)
    pole(canvas, x, z, y)
    rim = canvas.surface(Street.TRAFFIC_SIGN, palette.lacquer(canvas))
    face = canvas.surface(Street.TRAFFIC_SIGN, palette.lacquer(canvas))
    shape = int(canvas.rng.integers(0, 3))
    for surface, r in ((rim, radius), (face, 0.72 * radius)):
        corners = (camera.project(x - r, y + r, z), camera.project(x + r, y - r, z))
        if shape == 0:
            canvas.ellipse(*corners, surface)
        elif shape == 1:
            canvas.rectangle(*corners, surface)
        else:
            (left, top), (right, bottom) = corners
            canvas.polygon([(left, bottom), ((left + right) // 2, top), (right, bottom)], surface)


def unlabelled_box(canvas: Canvas, x: float, z: float) -> None:
    """A skip or crate: void, as the many objects of a street that have no class."""
    camera = canvas.camera
    half, height = canvas.uniform(0.4, 0.8), canvas.uniform(0.8, 1.4)
    surface = canvas.surface(Street.VOID, palette.lacquer(canvas))
    canvas.rectangle(camera.project(x - half, height, z), camera.project(x + half, 0, z), surface)


def bonnet(canvas: Canvas) -> None:
    """The front of the recording car: void."""
    camera = canvas.camera
    surface = canvas.surface(Street.VOID, palette.lacquer(canvas))
    top = round(camera.height * canvas.uniform(0.93, 0.97))
    canvas.ellipse(
        (-camera.width // 10, top), (camera.width + camera.width // 10, 2 * camera.height), surface
    )

"""Cars, trucks, buses and trains: boxes along the street, or in profile across it."""

from __future__ import annotations

from dataclasses import dataclass

from lgcnet_fast.data.painting import palette
from lgcnet_fast.data.painting.canvas import Canvas, Street


@dataclass(frozen=True)
class Body:
    """A vehicle's box in metres: lateral centre, size, and the depth of its near end."""

    label: Street
    x: float
    z: float
    width: float
    length: float
    bottom: float
    top: float
    colour: palette.Colour

    @property
    def inner(self) -> float:
        """Lateral position of the long side that the camera sees."""
        return self.x - self.width / 2 * (1 if self.x > 0 else -1)

    @property
    def shows_side(self) -> bool:
        return self.inner * self.x > 0


def car(canvas: Canvas, x: float, z: float) -> None:
    colour = palette.lacquer(canvas)
    tall = canvas.uniform(1.35, 1.8)
    body = Body(Street.CAR, x, z, 1.8, canvas.uniform(3.6, 4.6), 0.25, 0.55 * tall, colour)
    _ground_shadow(canvas, body)
    cabin = Body(Street.CAR, x, z + 0.5, 1.5, 0.6 * body.length, 0.5 * tall, tall, colour)
    _box(canvas, cabin)
    _rear_panel(canvas, cabin, palette.GLASS, (0.12, 0.12), (0.88, 0.85))
    _side_panel(canvas, cabin, palette.GLASS, (0.08, 0.2), (0.92, 0.85))
    _box(canvas, body)
    _rear_wheels(canvas, body)
    _tail_lights(canvas, body)


def truck(canvas: Canvas, x: float, z: float) -> None:
    cargo = Body(
        Street.TRUCK,
        x,
        z,
        2.5,
        canvas.uniform(5, 8),
        0.9,
        canvas.uniform(3, 3.8),
        palette.lacquer(canvas),
    )
    chassis = Body(Street.TRUCK, x, z, 2.3, cargo.length + 2, 0.45, 1.0, palette.BLACK)
    cab = Body(
        Street.TRUCK,
        x,
        z + cargo.length + 0.3,
        2.4,
        1.8,
        0.5,
        canvas.uniform(2.4, 3),
        palette.lacquer(canvas),
    )
    _ground_shadow(canvas, chassis)
    _box(canvas, cab)
    _side_panel(canvas, cab, palette.GLASS, (0.2, 0.55), (0.8, 0.9))
    _box(canvas, chassis)
    _box(canvas, cargo)
    _rear_wheels(canvas, chassis)


def bus(canvas: Canvas, x: float, z: float) -> None:
    body = Body(
        Street.BUS,
        x,
        z,
        2.5,
        canvas.uniform(8, 13),
        0.35,
        canvas.uniform(2.9, 3.3),
        palette.lacquer(canvas),
    )
    _ground_shadow(canvas, body)
    _box(canvas, body)
    _rear_panel(canvas, body, palette.GLASS, (0.1, 0.5), (0.9, 0.88))
    _side_panel(canvas, body, palette.GLASS, (0.03, 0.48), (0.97, 0.85))
    _rear_wheels(canvas, body)
    _tail_lights(canvas, body)


def train(canvas: Canvas, x: float, z: float) -> None:
    """A tram: longer and taller than a bus, on rails, with a painted waist and a pantograph."""
    body = Body(
        Street.TRAIN,
        x,
        z,
        2.6,
        canvas.uniform(18, 30),
        0.25,
        canvas.uniform(3.3, 3.8),
        palette.lacquer(canvas),
    )
    _ground_shadow(canvas, body)
    _box(canvas, body)
    _rear_panel(canvas, body, palette.GLASS, (0.06, 0.52), (0.46, 0.85))
    _rear_panel(canvas, body, palette.GLASS, (0.54, 0.52), (0.94, 0.85))
    _side_panel(canvas, body, palette.GLASS, (0.02, 0.55), (0.98, 0.82))
    waist = palette.lacquer(canvas)
    _rear_panel(canvas, body, waist, (0.0, 0.15), (1.0, 0.4))
    _side_panel(canvas, body, waist, (0.0, 0.15), (1.0, 0.4))
    camera = canvas.camera
    arm = canvas.surface(Street.TRAIN, palette.BLACK)
    raised = [
        camera.project(x + dx, body.top + dy, z + 3)
        for dx, dy in ((-0.5, 0.0), (0.3, 0.5), (-0.4, 1.0))
    ]
    canvas.line(raised, arm, 0.12 * camera.scale(z))


def profile(canvas: Canvas, label: Street, x: float, z: float) -> None:
    """The vehicle across the street, seen from its side; `x` is its centre."""
    length, top = {
        Street.CAR: (canvas.uniform(3.8, 4.8), canvas.uniform(1.35, 1.7)),
        Street.TRUCK: (canvas.uniform(6.5, 9), canvas.uniform(3, 3.7)),
        Street.BUS: (canvas.uniform(9, 13), canvas.uniform(2.9, 3.3)),
        Street.TRAIN: (canvas.uniform(16, 26), canvas.uniform(3.3, 3.8)),
    }[label]
    paint = canvas.surface(label, palette.lacquer(canvas))
    glass = canvas.surface(label, palette.GLASS)
    left, heading = x - length / 2, canvas.side()

    def rectangle(surface: int, low: tuple[float, float], high: tuple[float, float]) -> None:
        start, stop = (low[0], high[0]) if heading > 0 else (1 - high[0], 1 - low[0])
        canvas.rectangle(
            canvas.camera.project(left + start * length, high[1] * top, z),
            canvas.camera.project(left + stop * length, low[1] * top, z),
            surface,
        )

    if label == Street.CAR:
        outline = [
            (0.0, 0.2),
            (0.0, 0.55),
            (0.2, 0.6),
            (0.34, 1.0),
            (0.72, 1.0),
            (0.86, 0.62),
            (1.0, 0.55),
            (1.0, 0.2),
        ]
        shaped = [(u if heading > 0 else 1 - u, v) for u, v in outline]
        canvas.polygon(
            [canvas.camera.project(left + u * length, v * top, z) for u, v in shaped], paint
        )
        rectangle(glass, (0.36, 0.6), (0.7, 0.92))
    elif label == Street.TRUCK:
        cargo = canvas.surface(label, palette.lacquer(canvas))
        rectangle(canvas.surface(label, palette.BLACK), (0.0, 0.14), (1.0, 0.28))
        rectangle(cargo, (0.0, 0.26), (0.76, 1.0))
        rectangle(paint, (0.79, 0.14), (1.0, 0.78))
        rectangle(glass, (0.87, 0.5), (0.98, 0.72))
    else:
        rectangle(paint, (0.0, 0.1), (1.0, 1.0))
        band = canvas.surface(label, palette.GLASS)
        rectangle(band, (0.02, 0.5), (0.98, 0.85))
    if label == Street.TRAIN:
        livery = canvas.surface(label, palette.lacquer(canvas))
        rectangle(livery, (0.0, 0.15), (1.0, 0.4))
    else:
        _profile_wheels(canvas, label, left, length, z)


def _profile_wheels(canvas: Canvas, label: Street, left: float, length: float, z: float) -> None:
    tyre = canvas.surface(label, palette.BLACK)
    radius = 0.33 if label == Street.CAR else 0.48
    for share in (0.18, 0.82):
        centre = left + share * length
        canvas.ellipse(
            canvas.camera.project(centre - radius, 2 * radius, z),
            canvas.camera.project(centre + radius, 0, z),
            tyre,
        )


def _box(canvas: Canvas, body: Body) -> None:
    """The long side that shows, then the near end."""
    project = canvas.camera.project
    far = body.z + body.length
    if body.shows_side:
        side = canvas.surface(body.label, body.colour)
        canvas.polygon(
            [
                project(body.inner, body.bottom, body.z),
                project(body.inner, body.top, body.z),
                project(body.inner, body.top, far),
                project(body.inner, body.bottom, far),
            ],
            side,
            light=canvas.uniform(0.6, 0.95),
        )
    end = canvas.surface(body.label, body.colour)
    half = body.width / 2
    canvas.rectangle(
        project(body.x - half, body.top, body.z), project(body.x + half, body.bottom, body.z), end
    )


def _rear_panel(
    canvas: Canvas,
    body: Body,
    colour: palette.Colour,
    low: tuple[float, float],
    high: tuple[float, float],
) -> None:
    """A rectangle on the near end; corners as shares of its width and height."""
    surface = canvas.surface(body.label, colour)
    left, tall = body.x - body.width / 2, body.top - body.bottom
    canvas.rectangle(
        canvas.camera.project(left + high[0] * body.width, body.bottom + high[1] * tall, body.z),
        canvas.camera.project(left + low[0] * body.width, body.bottom + low[1] * tall, body.z),
        surface,
    )


def _side_panel(
    canvas: Canvas,
    body: Body,
    colour: palette.Colour,
    low: tuple[float, float],
    high: tuple[float, float],
) -> None:
    """A panel on the long side; corners as shares of its length and height."""
    if not body.shows_side:
        return
    surface = canvas.surface(body.label, colour)
    tall = body.top - body.bottom
    corners = [(low[0], low[1]), (low[0], high[1]), (high[0], high[1]), (high[0], low[1])]
    canvas.polygon(
        [
            canvas.camera.project(body.inner, body.bottom + v * tall, body.z + u * body.length)
            for u, v in corners
        ],
        surface,
    )


def _rear_wheels(canvas: Canvas, body: Body) -> None:
    tyre = canvas.surface(body.label, palette.BLACK)
    width = 0.13 * body.width
    for left in (body.x - body.width / 2, body.x + body.width / 2 - width):
        canvas.rectangle(
            canvas.camera.project(left, body.bottom + 0.1, body.z),
            canvas.camera.project(left + width, 0, body.z),
            tyre,
        )


def _tail_lights(canvas: Canvas, body: Body) -> None:
    lamp = canvas.surface(body.label, palette.TAIL_LIGHT)
    y, width = body.bottom + 0.5 * min(1.0, body.top - body.bottom), 0.12 * body.width
    for left in (body.x - body.width / 2, body.x + body.width / 2 - width):
        canvas.rectangle(
            canvas.camera.project(left, y + 0.12, body.z),
            canvas.camera.project(left + width, y - 0.08, body.z),
            lamp,
        )


def _ground_shadow(canvas: Canvas, body: Body) -> None:
    half = body.width / 2 + 0.25
    project = canvas.camera.project
    canvas.shadow(
        [
            project(body.x - half, 0, body.z - 0.3),
            project(body.x - half, 0, body.z + body.length),
            project(body.x + half, 0, body.z + body.length),
            project(body.x + half, 0, body.z - 0.3),
        ],
        light=0.5,
    )

"""Persons, riders and two-wheelers, seen from the side or from behind."""

from __future__ import annotations

from lgcnet_fast.data.painting import palette
from lgcnet_fast.data.painting.canvas import Canvas, Street


def person(canvas: Canvas, x: float, z: float) -> None:
    camera = canvas.camera
    tall = canvas.uniform(1.5, 1.95)
    stride = canvas.uniform(0.05, 0.35)
    legs = canvas.surface(Street.PERSON, palette.darker(palette.lacquer(canvas), 0.8))
    hip = camera.project(x, 0.48 * tall, z)
    width = 0.2 * camera.scale(z)
    for foot in (-stride, stride):
        canvas.line([hip, camera.project(x + foot, 0.02, z)], legs, width)
    _upper_body(canvas, Street.PERSON, x, 0.45 * tall, 0.55 * tall, z, lean=0.0)


def rider(canvas: Canvas, x: float, z: float, motorised: bool) -> None:
    """A rider on a motorcycle or a bicycle."""
    heading = canvas.side()
    mount = motorcycle if motorised else bicycle
    mount(canvas, x, z, heading)
    camera = canvas.camera
    legs = canvas.surface(Street.RIDER, palette.darker(palette.lacquer(canvas), 0.8))
    seat = camera.project(x - 0.15 * heading, 0.95, z)
    knee = camera.project(x + 0.25 * heading, 0.75, z)
    foot = camera.project(x + 0.1 * heading, 0.3, z)
    canvas.line([seat, knee, foot], legs, 0.2 * camera.scale(z))
    lean = 0.3 * heading * canvas.uniform(0.5, 1)
    _upper_body(canvas, Street.RIDER, x - 0.15 * heading, 0.9, canvas.uniform(0.85, 1.0), z, lean)


def bicycle(canvas: Canvas, x: float, z: float, heading: int) -> None:
    camera = canvas.camera
    scale = camera.scale(z)
    _wheels(canvas, Street.BICYCLE, x, z, radius=0.36, apart=0.55, rim=0.78)
    frame = canvas.surface(Street.BICYCLE, palette.lacquer(canvas))
    rear, front = x - 0.55 * heading, x + 0.55 * heading
    points = [(rear, 0.36), (x - 0.2 * heading, 0.8), (x + 0.38 * heading, 0.85), (x, 0.36)]
    outline = [camera.project(px, py, z) for px, py in points]
    canvas.line([*outline, outline[0]], frame, 0.09 * scale)
    fork = [(front, 0.36), (x + 0.38 * heading, 0.85), (x + 0.3 * heading, 1.05)]
    canvas.line([camera.project(px, py, z) for px, py in fork], frame, 0.09 * scale)


def motorcycle(canvas: Canvas, x: float, z: float, heading: int) -> None:
    camera = canvas.camera
    _wheels(canvas, Street.MOTORCYCLE, x, z, radius=0.33, apart=0.68, rim=0.5)
    body = canvas.surface(Street.MOTORCYCLE, palette.lacquer(canvas))
    outline = [
        (-0.85, 0.75),
        (-0.1, 0.8),
        (0.1, 0.98),
        (0.45, 1.0),
        (0.6, 0.5),
        (0.2, 0.25),
        (-0.35, 0.25),
    ]
    canvas.polygon([camera.project(x + px * heading, py, z) for px, py in outline], body)
    engine = canvas.surface(Street.MOTORCYCLE, palette.BLACK)
    canvas.rectangle(camera.project(x - 0.25, 0.5, z), camera.project(x + 0.22, 0.2, z), engine)
    bars = [camera.project(x + px * heading, py, z) for px, py in ((0.65, 0.35), (0.4, 1.15))]
    canvas.line(bars, engine, 0.1 * camera.scale(z))


def _wheels(
    canvas: Canvas, label: Street, x: float, z: float, radius: float, apart: float, rim: float
) -> None:
    """`rim`: radius of the inner disc as a share of the wheel's."""
    camera = canvas.camera
    tyre = canvas.surface(label, palette.BLACK)
    spokes = canvas.surface(label, palette.stone(canvas))
    for centre in (x - apart, x + apart):
        for surface, r in ((tyre, radius), (spokes, rim * radius)):
            canvas.ellipse(
                camera.project(centre - r, radius + r, z),
                camera.project(centre + r, radius - r, z),
                surface,
            )


def _upper_body(
    canvas: Canvas, label: Street, x: float, hip: float, length: float, z: float, lean: float
) -> None:
    """Torso and head above the hip; `lean` moves the shoulders sideways. Metres."""
    camera = canvas.camera
    cloth = canvas.surface(label, palette.lacquer(canvas))
    shoulder, half = hip + 0.68 * length, canvas.uniform(0.2, 0.28)
    outline = [
        (x - 0.17, hip),
        (x - half + lean, shoulder),
        (x + half + lean, shoulder),
        (x + 0.17, hip),
    ]
    canvas.polygon([camera.project(px, py, z) for px, py in outline], cloth)
    canvas.line(
        [
            camera.project(x + lean + half, shoulder - 0.05, z),
            camera.project(x + 1.6 * lean + half, hip + 0.05, z),
        ],
        cloth,
        0.12 * camera.scale(z),
    )
    head = canvas.surface(label, palette.skin(canvas))
    radius, y = 0.14, shoulder + 0.18
    canvas.ellipse(
        camera.project(x + 1.2 * lean - radius, y + radius, z),
        camera.project(x + 1.2 * lean + radius, y - radius, z),
        head,
    )

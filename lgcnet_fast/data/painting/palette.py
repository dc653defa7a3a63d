"""Colour families. Classes share them, so that colour alone names no class."""

from __future__ import annotations

from lgcnet_fast.data.painting.canvas import Canvas, Colour

# The parts of objects keep their colours: shapes are told by how such parts lie to each other.
GLASS: Colour = (62, 74, 88)
BLACK: Colour = (36, 34, 34)
"""Tyres, chassis, engines."""
LAMPS: tuple[Colour, ...] = ((225, 60, 50), (225, 170, 60), (70, 210, 130))
"""Of a traffic light, from the top."""
TAIL_LIGHT: Colour = (190, 48, 44)


def stone(canvas: Canvas) -> Colour:
    """Asphalt, concrete, plaster, brick."""
    grey = canvas.uniform(70, 170)
    warm = canvas.uniform(-6, 26)
    return _perhaps_shared(canvas, (grey + warm, grey, grey - warm))


def leaf(canvas: Canvas) -> Colour:
    """Green to autumn brown."""
    green = canvas.uniform(70, 150)
    red = green * canvas.uniform(0.5, 1.15)
    return _perhaps_shared(canvas, (red, green, green * canvas.uniform(0.35, 0.65)))


def lacquer(canvas: Canvas) -> Colour:
    """Paint and cloth: anything."""
    grey = canvas.uniform(50, 190)
    return (
        grey + canvas.uniform(-45, 60),
        grey + canvas.uniform(-45, 45),
        grey + canvas.uniform(-45, 60),
    )


def air(canvas: Canvas) -> Colour:
    """Blue, white, grey and dusk skies."""
    grey = canvas.uniform(130, 215)
    blue = canvas.uniform(-25, 45)
    return _perhaps_shared(canvas, (grey - blue, grey - 0.2 * blue, grey + 0.6 * blue))


def skin(canvas: Canvas) -> Colour:
    grey = canvas.uniform(70, 190)
    return (grey + 25, grey, grey - 18)


def darker(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _perhaps_shared(canvas: Canvas, own: Colour) -> Colour:
    return lacquer(canvas) if canvas.chance(canvas.difficulty.colour_swap) else own

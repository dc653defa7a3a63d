"""A pinhole camera above a flat street: metres to pixels."""

from __future__ import annotations

from dataclasses import dataclass

Point = tuple[int, int]

EYE = 1.5
"""Height of the camera above the ground, metres."""


@dataclass(frozen=True)
class Camera:
    """Looks along the street (z); x points right, y up from the ground. Lengths in metres."""

    height: int
    width: int
    horizon: float
    """Image row of the horizon."""
    vanish: float
    """Image column of the vanishing point."""
    focal: float
    """Pixels."""

    def scale(self, z: float) -> float:
        """Pixels a metre at depth z."""
        return self.focal / z

    def project(self, x: float, y: float, z: float) -> Point:
        """(column, row) in whole pixels, perhaps outside the image."""
        scale = self.scale(z)
        return round(self.vanish + x * scale), round(self.horizon + (EYE - y) * scale)

    @property
    def nearest(self) -> float:
        """Depth of the ground at the bottom row."""
        return EYE * self.focal / (self.height - self.horizon)

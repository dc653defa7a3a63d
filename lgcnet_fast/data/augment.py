"""Random windows and colours, drawn from an explicit CPU generator: the same on every device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lgcnet_fast.config import Augmentation
from lgcnet_fast.data.windows import Window

# Weights of luminance: ITU-R BT.601.
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Scale, crop, flip and colour of `[...augmentation]` in the configuration."""

    config: Augmentation

    @property
    def crop(self) -> tuple[int, int]:
        return self.config.crop

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> Window:
        """A window on a source of `size`: scaled uniformly in range, then cropped.

        A scaled image smaller than the crop lies anywhere inside it.
        """
        share, down, across, flip = _uniform(4, generator)
        low, high = self.config.scale
        scale = low + (high - low) * share
        return Window(
            _offset(size[0], scale, self.crop[0], down),
            _offset(size[1], scale, self.crop[1], across),
            self.crop[0] / scale,
            self.crop[1] / scale,
            self.config.flip and flip < 0.5,
        )


@dataclass(frozen=True)
class ClassificationAugmentation:
    """Random resized crop and flip, as in the training of ImageNet networks."""

    image_size: int
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    @property
    def crop(self) -> tuple[int, int]:
        return self.image_size, self.image_size

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> Window:
        """A rectangle of random share and aspect; one that does not fit is cut to the image."""
        share, ratio, down, across, flip = _uniform(5, generator)
        low, high = self.area
        area = size[0] * size[1] * (low + (high - low) * share)
        narrow, wide = (math.log(side) for side in self.aspect)
        aspect = math.exp(narrow + (wide - narrow) * ratio)
        height = min(math.sqrt(area / aspect), size[0])
        width = min(math.sqrt(area * aspect), size[1])
        top, left = (size[0] - height) * down, (size[1] - width) * across
        return Window(top, left, height, width, flip < 0.5)


def centre_window(size: tuple[int, int], share: float = 224 / 256) -> Window:
    """The central square whose side is a share of the shorter side."""
    side = min(size) * share
    return Window((size[0] - side) / 2, (size[1] - side) / 2, side, side)


def draw_colour_factors(count: int, strength: float, generator: torch.Generator) -> Tensor:
    """(3, count, 1, 1, 1): brightness, contrast, saturation, uniform in 1 +- strength."""
    factors = 1 + strength * (2 * torch.rand(3, count, 1, 1, 1, generator=generator) - 1)
    return factors.clamp_(min=0)


def jitter_colours(images: Tensor, factors: Tensor) -> Tensor:
    """float32 (B, 3, h, w) in 0..255 with other brightness, contrast and saturation.

    Contrast is about the mean luminance of each image.
    """
    brightness, contrast, saturation = factors
    images = images * brightness
    pivot = _luminance(images).mean(dim=(2, 3), keepdim=True)
    images = pivot + (images - pivot) * contrast
    grey = _luminance(images)
    return (grey + (images - grey) * saturation).clamp_(0, 255)


def _offset(length: int, scale: float, crop: int, share: float) -> float:
    """Start of a crop, in source pixels; a whole number of scaled pixels."""
    return round((length * scale - crop) * share) / scale


def _luminance(images: Tensor) -> Tensor:
    red, green, blue = (images[:, i : i + 1] * weight for i, weight in enumerate(LUMINANCE))
    return red + green + blue


def _uniform(count: int, generator: torch.Generator) -> list[float]:
    return torch.rand(count, generator=generator).tolist()

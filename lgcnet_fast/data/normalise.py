"""From uint8 RGB to what networks take: ImageNet mean 0 and deviation 1, channels last."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Of ImageNet, RGB in 0..1."""


def normalise(images: Tensor) -> Tensor:
    """float32 (B, 3, h, w) in 0..255 to normalised channels_last."""
    centred = images.contiguous(memory_format=torch.channels_last) - mean_colour(images.device)
    return centred.mul_(_inverse_deviation(images.device))


def network_input(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """uint8 (B, H, W, 3) to normalised float32 (B, 3, h, w), bilinear where `size` differs.

    Without antialiasing, as the scaling of the training crops.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    if size is not None and tuple(size) != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    return normalise(pixels)


# Both are kept for each device: copying them anew would stall the GPU once a batch.
@cache
def mean_colour(device: torch.device) -> Tensor:
    """float32 (1, 3, 1, 1) on the 0..255 scale."""
    return torch.tensor(MEAN, device=device).view(1, 3, 1, 1) * 255


@cache
def _inverse_deviation(device: torch.device) -> Tensor:
    return 1 / (torch.tensor(DEVIATION, device=device).view(1, 3, 1, 1) * 255)

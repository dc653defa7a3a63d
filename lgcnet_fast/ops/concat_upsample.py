"""Bilinear resizing with aligned corners, alone and in front of a concatenation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners=True: (N, C, h, w) -> (N, C, *size); x itself if the size fits.

    Aligned corners map sizes n -> 2n - 1 exactly, which is how LGCNet's 16k + 1 inputs grow back.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def concat_upsample(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Concatenation along channels of maps (N, C_i, h_i, w_i), each resized to `size` first."""
    resized = [upsample(x, size) for x in maps]
    return resized[0] if len(resized) == 1 else torch.cat(resized, dim=1)

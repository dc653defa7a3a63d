"""From logits to the label map of the whole image, also where full-size logits would not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from lgcnet_fast.ops import upsample_argmax

MOST_VALUES = 2**28
"""Upsampled logits (classes x height x width) held at once; about 1 GB."""


def argmax_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """`ops.upsample_argmax`, in bands of rows where whole maps would not fit in memory."""
    height, width = size
    rows = max(1, MOST_VALUES // (logits.shape[1] * width))
    if rows >= height:
        return upsample_argmax(logits, size)
    # Aligned corners: output row i lies at row i * (h - 1) / (H - 1) of the logits.
    last = logits.shape[2] - 1
    positions = torch.linspace(0, last, height, dtype=torch.float64, device=logits.device)
    bands = []
    for at in positions.split(rows):
        above = at.floor().long()
        below = (above + 1).clamp(max=last)
        share = (at - above).to(logits.dtype)[:, None]
        band = torch.lerp(logits[:, :, above], logits[:, :, below], share)
        bands.append(upsample_argmax(band, (len(at), width)))
    return torch.cat(bands, dim=1)

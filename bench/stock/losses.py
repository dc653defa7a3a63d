"""Losses on resized logits in plain PyTorch; labels are int64, 255 is ignored."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255


def resized(logits: Tensor, labels: Tensor, in_float32: bool) -> Tensor:
    """in_float32: resized in float32, otherwise in the logits' dtype and converted afterwards."""
    if in_float32 and logits.dtype != torch.float64:
        logits = logits.float()
    full = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)
    return full if full.dtype == torch.float64 else full.float()


def resized_cross_entropy(logits: Tensor, labels: Tensor, in_float32: bool = True) -> Tensor:
    return F.cross_entropy(resized(logits, labels, in_float32), labels, ignore_index=IGNORED)


def hardest_pixels_loss(
    logits: Tensor, labels: Tensor, threshold: float, keep: float, in_float32: bool = True
) -> Tensor:
    """Mean over the pixels whose true class is less probable than `threshold`, or that are among
    the hardest ceil(keep * valid); without waiting for the device, so that a graph captures it.
    """
    full = resized(logits, labels, in_float32)
    loss = F.cross_entropy(full, labels, ignore_index=IGNORED, reduction="none")
    valid = labels != IGNORED
    with torch.no_grad():
        ranked = loss.where(valid, -1).flatten().topk(math.ceil(keep * loss.numel())).values
        wanted = (valid.sum() * keep).ceil().long()
        # `take`: indexing by a scalar tensor reads it on the host.
        hardest = ranked.take((wanted - 1).clamp(min=0))
        hard = valid & ((loss > -math.log(threshold)) | (loss >= hardest))
    return loss.where(hard, 0).sum() / hard.sum().clamp(min=1)

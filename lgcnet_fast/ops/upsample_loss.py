"""The last step of a segmenter: upsampling to the labels' size with the loss or the argmax.

Logits are (N, classes, h, w) at the network's output stride and labels (N, H, W) of any integer
dtype. Upsampling is bilinear with aligned corners; losses are computed in float32 (float64 for
float64 logits), also under autocast. A batch without a valid pixel gives loss 0 and gradient 0.

Kernels never write full-size logits. All raise `OperandError` for arguments that do not fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import fused_loss
from lgcnet_fast.ops.backend import Operation
from lgcnet_fast.ops.concat_upsample import resize
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape, check_size

Size = tuple[int, int]

_LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def upsample_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = 255
) -> Tensor:
    """Scalar cross entropy, the (class-weighted) mean over the valid pixels.

    weight: (classes,) float or none.
    """
    _check(logits, target, weight)
    return _cross_entropy(logits, target, weight, ignore_index)


def upsample_ohem(
    logits: Tensor,
    target: Tensor,
    threshold: float = 0.7,
    keep: float = 1 / 16,
    weight: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Scalar cross entropy over the hard pixels only (online bootstrapping, Wu et al. 2016).

    Hard are the valid pixels whose softmax probability of the true class is below `threshold`,
    and in any case the hardest ceil(keep * valid) of the batch, ties included. The mean is
    weighted as in `upsample_cross_entropy`; weights do not affect which pixels are hard.
    """
    _check(logits, target, weight)
    for name, share in (("threshold", threshold), ("keep", keep)):
        if not 0 <= share <= 1:
            raise OperandError(f"{name}: {share}, need a number from 0 to 1")
    return _ohem(logits, target, threshold, keep, weight, ignore_index)


def upsample_argmax(logits: Tensor, size: Size) -> Tensor:
    """Labels (N, *size): uint8 for up to 256 classes, else int64."""
    check_map("logits", logits)
    check_size("size", size)
    return _argmax(logits, size)


def _check(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    check_map("logits", logits)
    check_shape("target", target, (logits.shape[0], *target.shape[-2:]))
    check_size("size of target", target.shape[1:])
    check_beside("target", target, "logits", logits)
    if target.dtype not in _LABELS:
        raise OperandError(f"target: dtype {target.dtype}, need integers")
    if weight is None:
        return
    check_shape("weight", weight, (logits.shape[1],))
    check_beside("weight", weight, "logits", logits)
    if not weight.is_floating_point():
        raise OperandError(f"weight: dtype {weight.dtype}, need floats")


# -- plain forms ----------------------------------------------------------------------------------


def _mean_over_valid(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    target = target.long()
    full = _full_size(logits, target)
    own = None if weight is None else weight.to(full.dtype)
    total = F.cross_entropy(full, target, own, ignore_index=ignore_index, reduction="sum")
    return total / _mass(target != ignore_index, target, weight, full.dtype)


def _mean_over_hard(
    logits: Tensor,
    target: Tensor,
    threshold: float,
    keep: float,
    weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    target = target.long()
    full = _full_size(logits, target)
    valid = target != ignore_index
    loss = F.cross_entropy(full, target, ignore_index=ignore_index, reduction="none")
    with torch.no_grad():
        hard = valid & ((loss.neg().exp() < threshold) | (loss >= _hardest(loss, valid, keep)))
    if weight is not None:
        loss = loss * weight.to(loss.dtype)[target.where(valid, 0)]
    return loss.where(hard, 0).sum() / _mass(hard, target, weight, full.dtype)


def _labels(logits: Tensor, size: Size) -> Tensor:
    labels = resize(logits, size).argmax(dim=1)
    return labels.to(torch.uint8) if logits.shape[1] <= 256 else labels


def _full_size(logits: Tensor, target: Tensor) -> Tensor:
    precise = logits if logits.dtype == torch.float64 else logits.float()
    height, width = target.shape[-2:]
    return resize(precise, (height, width))


def _mass(pixels: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Number, or summed class weight, of the marked pixels: what a mean divides by, never 0."""
    if weight is None:
        return pixels.sum().clamp(min=1).to(dtype)
    weights = weight.to(dtype)[target.where(pixels, 0)].where(pixels, 0)
    return weights.sum().clamp(min=torch.finfo(dtype).tiny)


def _hardest(loss: Tensor, valid: Tensor, keep: float) -> Tensor:
    """Loss of the last of the ceil(keep * valid) hardest pixels, without waiting for the device.

    The count depends on the labels; `topk` takes the count for a batch without ignored pixels,
    which is never smaller, and the wanted rank is picked on the device.
    """
    most = max(1, math.ceil(keep * loss.numel()))
    ranked = loss.where(valid, -1).flatten().topk(min(most, loss.numel())).values
    wanted = (valid.sum().double() * keep).ceil().long()
    # `take`: indexing by a scalar tensor would read it on the host.
    last = ranked.take((wanted - 1).clamp(min=0, max=len(ranked) - 1))
    return last.where(wanted > 0, torch.inf)


_cross_entropy = Operation("upsample_cross_entropy", _mean_over_valid, **fused_loss.CROSS_ENTROPY)
_ohem = Operation("upsample_ohem", _mean_over_hard, **fused_loss.OHEM)
_argmax = Operation("upsample_argmax", _labels, **fused_loss.ARGMAX)

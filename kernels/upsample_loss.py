"""Final upsampling fused with the cross entropy, of all valid pixels or of the hard ones (OHEM).

With z the logits upsampled to the labels' size (bilinear, aligned corners) and y the labels, over
the counted pixels p with weight v_p (the class weight of y_p, or 1):

    loss = sum_p v_p l_p / V,   l_p = log sum_c exp z_pc - z_p,y_p,   V = sum_p v_p
    dloss / dz_pc = v_p (softmax(z_p)_c - [c = y_p]) / V

Full-resolution logits and their gradient never exist in memory: a lane owns a column of cells
(see upsample_cells.py) and sums the gradient of a cell's pixels, per class, into its four corners.
Because V is a factor of the whole gradient, loss and gradient come from the same pass, the corner
sums still to be divided by V. A cell's lower corners are the next cell's upper ones, so that a
program going down a band of cell rows stores two sums, left and right, a low-resolution row: these
are added up in the backward pass. No atomics: the same inputs give the same bits.

Least traffic: logits and labels once; with the gradient 2 (1 + 1 / rows) float32 values
written and read again for each logit. Arithmetic: about 11 operations a class and pixel, one of
them an exponential.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, check_like
from lgcnet_fast.kernels.order_statistic import hardest_loss
from lgcnet_fast.kernels.rows import checked_out
from lgcnet_fast.kernels.upsample_cells import CellConfig, check_logits, class_rows
from lgcnet_fast.kernels.upsample_loss_kernels import (
    logits_gradient_kernel,
    losses_kernel,
    mean_kernel,
    sums_kernel,
)

LOSS = CellConfig(lanes=32, rows=4, warps=1)

_LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class LossSums(NamedTuple):
    """What the forward pass leaves to the backward pass."""

    corners: Tensor
    """(N, bands of cells, rows of a band + 1, 2, classes, w): see `sums_kernel`."""
    mass: Tensor
    """Scalar V."""


class _HardPixels(NamedTuple):
    """Hard are losses above `easy`, and those of at least `hardest`."""

    losses: Tensor
    hardest: Tensor
    easy: float


def upsample_cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    gradient: bool = True,
    config: CellConfig = LOSS,
) -> tuple[Tensor, LossSums | None]:
    """Scalar loss, the weighted mean over the valid pixels, and the sums for the backward pass.

    logits (N, classes, h, w), NHWC, at most 32 classes; target (N, H, W) of an integer dtype;
    weight (classes,) float. The loss is float32 (float64 for float64 logits), 0 where no pixel is
    valid, and NaN where a label is neither a class nor `ignore_index`. Without `gradient` there
    are no sums. Raises `ValueError`.
    """
    _check(logits, target, weight)
    rows = class_rows(logits)
    return _launch_sums(rows, logits, target, weight, ignore_index, None, gradient, config)


def upsample_ohem_forward(
    logits: Tensor,
    target: Tensor,
    threshold: float = 0.7,
    keep: float = 1 / 16,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    gradient: bool = True,
    config: CellConfig = LOSS,
) -> tuple[Tensor, LossSums | None]:
    """As `upsample_cross_entropy_forward`, over the hard pixels only.

    Hard are the valid pixels whose true class has a probability below `threshold`, and in any
    case the hardest ceil(keep * valid) of the batch, ties included. The device is never waited for.
    """
    _check(logits, target, weight)
    for name, share in (("threshold", threshold), ("keep", keep)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: {share}, need a number from 0 to 1")
    rows = class_rows(logits)
    losses = _launch_losses(rows, logits, target, ignore_index, config)
    easy = math.inf if threshold == 0 else -math.log(threshold)
    hard = _HardPixels(losses, hardest_loss(losses, keep), easy)
    return _launch_sums(rows, logits, target, weight, ignore_index, hard, gradient, config)


def upsample_loss_backward(
    sums: LossSums, grad_loss: Tensor, like: Tensor, out: Tensor | None = None, columns: int = 64
) -> Tensor:
    """Gradient of the logits, of the shape, dtype and layout (NHWC) of the logits `like`.

    grad_loss: scalar gradient of the loss, on the device of `like`. A program computes `columns`
    low-resolution pixels.
    """
    check_logits(like, like.shape[2:])
    batch, classes, h, w = like.shape
    rows = sums.corners.shape[2] - 1
    check_like(
        "corners", sums.corners, (batch, triton.cdiv(h, rows), rows + 1, 2, classes, w), like
    )
    check_like("grad_loss", grad_loss, (), like)
    out = checked_out("out", out, tuple(like.shape), like)
    logits_gradient_kernel[(triton.cdiv(w, columns), h, batch)](
        sums.corners, sums.mass, grad_loss, out, h, w,
        CLASSES=classes, CLASS_BLOCK=triton.next_power_of_2(classes), COLUMNS=columns,
        ROWS=rows, ACC=accumulator(like.dtype),
    )  # fmt: skip
    return out


def _check(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    check_logits(logits, target.shape[1:])
    check_like("target", target, (logits.shape[0], *target.shape[1:]), logits)
    if target.dtype not in _LABELS or not target.is_contiguous():
        raise ValueError(
            f"target: {target.dtype} of strides {target.stride()}, need contiguous integers"
        )
    if weight is None:
        return
    check_like("weight", weight, (logits.shape[1],), logits)
    if not weight.is_floating_point() or not weight.is_contiguous():
        raise ValueError(
            f"weight: {weight.dtype} of strides {weight.stride()}, need contiguous floats"
        )


def _launch_losses(
    rows: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    config: CellConfig,
) -> Tensor:
    """Loss of every pixel, float32 (N, H, W), -1 where it is ignored."""
    batch, classes, h, w = logits.shape
    height, width = target.shape[1:]
    losses = target.new_empty(target.shape, dtype=torch.float32)
    grid = (triton.cdiv(w, config.lanes), triton.cdiv(h, config.rows), batch)
    losses_kernel[grid](
        rows, target, losses, h, w, height, width, ignore_index,
        CLASSES=classes, PITCH=rows.shape[3], LANES=config.lanes, ROWS=config.rows,
        ACC=accumulator(logits.dtype), num_warps=config.warps,
    )  # fmt: skip
    return losses


def _launch_sums(
    rows: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    hard: _HardPixels | None,
    gradient: bool,
    config: CellConfig,
) -> tuple[Tensor, LossSums | None]:
    batch, classes, h, w = logits.shape
    height, width = target.shape[1:]
    grid = (triton.cdiv(w, config.lanes), triton.cdiv(h, config.rows), batch)
    sums = rows.new_empty(2, math.prod(grid))
    corners = rows.new_empty(batch, grid[1], config.rows + 1, 2, classes, w) if gradient else sums
    # Arguments that a variant of the kernel does not read are filled with others of their kind.
    losses, hardest, easy = hard or _HardPixels(sums, sums, 0.0)
    sums_kernel[grid](
        rows, target, sums if weight is None else weight, losses, hardest, corners, sums,
        h, w, height, width, ignore_index, easy,
        CLASSES=classes, PITCH=rows.shape[3], LANES=config.lanes, ROWS=config.rows,
        WEIGHTED=weight is not None, HARD_ONLY=hard is not None, GRADIENT=gradient,
        ACC=accumulator(logits.dtype), num_warps=config.warps,
    )  # fmt: skip
    loss, mass = rows.new_empty(()), rows.new_empty(())
    mean_kernel[(1,)](
        sums, loss, mass, sums.shape[1], BLOCK=1024, ACC=accumulator(logits.dtype), num_warps=8
    )
    return loss, LossSums(corners, mass) if gradient else None

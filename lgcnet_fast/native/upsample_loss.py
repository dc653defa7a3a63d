"""Launchers of csrc/upsample_loss.cuh: final upsampling fused with the cross entropy.

Least traffic: logits and labels once; with the gradient 2 (1 + 1 / rows) float32 values written
and read again for each logit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import (
    STORAGE,
    VIEW,
    check_dense,
    check_map,
    check_output,
    check_same,
    empty_floats,
    empty_map,
    pack,
    view_of,
)
from lgcnet_fast.native.order_statistic import hardest_loss
from lgcnet_fast.native.upsample_cells import (
    BLOCK,
    LOGITS,
    cell_grid,
    check_logits,
    logits_fields,
)

LOSS_ARGUMENTS = np.dtype(
    [
        ("logits", LOGITS),
        ("labels", np.dtype([("data", "u8"), ("bytes", "i4")], align=True)),
        *[(name, "u8") for name in ("weight", "hardest", "losses", "corners", "sums")],
        ("ignore_index", "i4"),
        ("easy", "f4"),
    ],
    align=True,
)

MEAN_ARGUMENTS = np.dtype(
    [*[(name, "u8") for name in ("sums", "loss", "mass")], ("count", "i4")], align=True
)

GRADIENT_ARGUMENTS = np.dtype(
    [
        *[(name, "u8") for name in ("corners", "mass", "grad_loss")],
        ("gradient", VIEW),
        *[(name, "i4") for name in ("classes", "height", "width", "rows")],
    ],
    align=True,
)

LABEL_BYTES = {
    torch.uint8: 1,
    torch.int8: -1,
    torch.int16: -2,
    torch.int32: -4,
    torch.int64: -8,
}
"""Negative: signed."""

ROWS = 4
"""Rows of cells in a band by default."""


class LossSums(NamedTuple):
    """What the forward pass leaves to the backward pass."""

    corners: Tensor
    """(N, bands of cells, rows of a band + 1, 2, classes, w) with the classes adjacent."""
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
    *,
    rows: int = ROWS,
    launcher: Launcher | None = None,
) -> tuple[Tensor, LossSums | None]:
    """Scalar float32 loss, the weighted mean over the valid pixels, and sums for the backward pass.

    logits (N, classes, h, w), NHWC, at most 32 classes; target (N, H, W) of an integer dtype;
    weight (classes,) float. The loss is 0 where no pixel is valid, and NaN where a label is neither
    a class nor `ignore_index`. Without `gradient` there are no sums. A block goes down `rows` rows
    of cells. Raises `ValueError` for arguments that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    weight = _checked_weight(logits, target, weight, launcher)
    return _sums(logits, target, weight, ignore_index, None, gradient, rows, launcher)


def upsample_ohem_forward(
    logits: Tensor,
    target: Tensor,
    threshold: float = 0.7,
    keep: float = 1 / 16,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    gradient: bool = True,
    *,
    rows: int = ROWS,
    launcher: Launcher | None = None,
) -> tuple[Tensor, LossSums | None]:
    """As `upsample_cross_entropy_forward`, over the hard pixels only.

    Hard are the valid pixels whose true class has a probability below `threshold`, and in any
    case the hardest ceil(keep * valid) of the batch, ties included. The device is never waited for.
    """
    launcher = launcher or load()
    weight = _checked_weight(logits, target, weight, launcher)
    for name, share in (("threshold", threshold), ("keep", keep)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: {share}, need a number from 0 to 1")
    losses = empty_floats(logits, *target.shape)
    fields = _fields(logits, target, None, ignore_index, (0, losses.data_ptr(), 0, 0), 0.0, rows)
    launcher.launch(
        instances.upsample_losses(STORAGE[logits.dtype]),
        cell_grid(logits, rows),
        BLOCK,
        pack(LOSS_ARGUMENTS, fields),
        logits.device,
    )
    easy = math.inf if threshold == 0 else -math.log(threshold)
    hard = _HardPixels(losses, hardest_loss(losses, keep, launcher=launcher), easy)
    return _sums(logits, target, weight, ignore_index, hard, gradient, rows, launcher)


def upsample_loss_backward(
    sums: LossSums,
    grad_loss: Tensor,
    like: Tensor,
    out: Tensor | None = None,
    *,
    launcher: Launcher | None = None,
) -> Tensor:
    """Gradient of the logits, of the shape, dtype and layout (NHWC) of the logits `like`.

    grad_loss: scalar gradient of the loss, on the device of `like`. Raises `ValueError`.
    """
    launcher = launcher or load()
    check_map("like", like, launcher)
    images, classes, height, width = like.shape
    rows = sums.corners.shape[2] - 1
    shape = (images, -(-height // rows), rows + 1, 2, classes, width)
    check_same("corners", sums.corners, shape, torch.float32, like.device)
    check_same("grad_loss", grad_loss, (), grad_loss.dtype, like.device)
    grad_loss = grad_loss.float()
    gradient = empty_map(tuple(like.shape), like) if out is None else out
    check_output("out", gradient, tuple(like.shape), like)
    grid = (-(-width * classes // 256), height, images)
    check_grid("logits_gradient", grid)
    fields = (
        *(one.data_ptr() for one in (sums.corners, sums.mass, grad_loss)),
        *(view_of(gradient), classes, height, width, rows),
    )
    instance = instances.logits_gradient(STORAGE[like.dtype])
    launcher.launch(instance, grid, (256, 1, 1), pack(GRADIENT_ARGUMENTS, fields), like.device)
    return gradient


def _checked_weight(
    logits: Tensor, target: Tensor, weight: Tensor | None, launcher: Launcher
) -> Tensor | None:
    """The class weights in float32. Raises `ValueError` for any argument."""
    check_logits(logits, target.shape[1:], launcher)
    shape = (logits.shape[0], *target.shape[1:])
    check_dense("target", target, shape, target.dtype, logits.device)
    if target.dtype not in LABEL_BYTES:
        raise ValueError(f"target: dtype {target.dtype}, need integers")
    if weight is None:
        return None
    check_dense("weight", weight, (logits.shape[1],), weight.dtype, logits.device)
    if not weight.is_floating_point():
        raise ValueError(f"weight: dtype {weight.dtype}, need floats")
    return weight.float()


def _fields(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    buffers: tuple[int, int, int, int],
    easy: float,
    rows: int,
) -> tuple[object, ...]:
    """The fields of LOSS_ARGUMENTS; buffers: hardest, losses, corners, sums, or 0 for none."""
    size = (target.shape[1], target.shape[2])
    return (
        logits_fields(logits, size, rows),
        (target.data_ptr(), LABEL_BYTES[target.dtype]),
        0 if weight is None else weight.data_ptr(),
        *(*buffers, ignore_index, easy),
    )


def _sums(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    hard: _HardPixels | None,
    gradient: bool,
    rows: int,
    launcher: Launcher,
) -> tuple[Tensor, LossSums | None]:
    grid = cell_grid(logits, rows)
    _, classes, _, width = logits.shape
    sums = empty_floats(logits, 2, math.prod(grid))
    corners = None
    if gradient:
        shape = (logits.shape[0], grid[1], rows + 1, 2, width, classes)
        corners = empty_floats(logits, *shape).transpose(4, 5)
    losses, hardest, easy = hard or _HardPixels(sums, sums, 0.0)
    buffers = (
        0 if hard is None else hardest.data_ptr(),
        losses.data_ptr(),
        0 if corners is None else corners.data_ptr(),
        sums.data_ptr(),
    )
    fields = _fields(logits, target, weight, ignore_index, buffers, easy, rows)
    instance = instances.upsample_loss_sums(STORAGE[logits.dtype])
    launcher.launch(instance, grid, BLOCK, pack(LOSS_ARGUMENTS, fields), logits.device)
    loss, mass = empty_floats(logits), empty_floats(logits)
    fields = (sums.data_ptr(), loss.data_ptr(), mass.data_ptr(), sums.shape[1])
    threads = (instances.MEAN_THREADS, 1, 1)
    arguments = pack(MEAN_ARGUMENTS, fields)
    launcher.launch(instances.upsample_loss_mean(), (1, 1, 1), threads, arguments, logits.device)
    return loss, None if corners is None else LossSums(corners, mass)

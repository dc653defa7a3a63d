"""Launchers of csrc/conv3.cuh: dense 3x3 convolutions and their gradients of maps, float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import check_dense, check_dense_maps, empty_map, pack

MOST_CONVOLUTIONS = 16
THREADS = 128
POSITIONS = 256
"""kMostConvolutionsOfAMap and kConv3Block of the kernel, and positions of a block whose warps all
have the same outputs."""
MOST_POSITIONS = 2**31 - 2 * POSITIONS
"""With the column of zeros."""
VECTOR = 4
"""Numbers that a thread reads at once, of which channels must be a multiple."""

ARGUMENTS = np.dtype(
    [
        *[(name, "u8", (MOST_CONVOLUTIONS,)) for name in ("x", "y")],
        *[(name, "u8") for name in ("weight", "mask")],
        *[(name, "i4") for name in ("summed", "channels", "outputs", "images")],
        *[(name, "i4") for name in ("height", "width", "relu", "mirrored", "tiles")],
    ],
    align=True,
)


def refusal(dtype: torch.dtype, shape: Sequence[int], outputs: int) -> str | None:
    """Why the kernel cannot serve a convolution of such a map, (N, C, H, W), to so many channels,
    or the gradient of the map."""
    images, channels, height, width = shape
    if dtype != torch.float32:
        return f"{dtype}, need torch.float32"
    for count in (channels, outputs):
        if count % VECTOR:
            return f"{count} channels, not a multiple of {VECTOR}"
    if images * height * (width + 1) > MOST_POSITIONS:
        return f"{images} x {height} x {width + 1} positions, at most {MOST_POSITIONS} fit"
    return None


def conv3(
    x: Tensor, weight: Tensor, *, relu: bool = False, launcher: Launcher | None = None
) -> list[Tensor]:
    """Of x or relu(x), B convolutions, stride 1, padding 1: maps (N, C_out, H, W), NHWC.

    x: (N, C, H, W), dense NHWC; weight: (B, 3, 3, C, C_out), contiguous; both float32. Raises
    `ValueError` for arguments that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    check_dense_maps("x", [x], x, launcher)
    _check_weight(weight, x)
    images, _, height, width = x.shape
    ys = [empty_map((images, weight.shape[-1], height, width), x) for _ in weight]
    _launch([x], weight, ys, None, relu=relu, launcher=launcher)
    return ys


def conv3_map_gradient(
    dys: Sequence[Tensor],
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """The gradient of the map that B of `conv3` read: (N, C, H, W), NHWC.

    dys: B of (N, C_out, H, W), dense NHWC; weight: (B, 3, 3, C_out, C), contiguous; mask: of a
    ReLU its x, like the result; all float32. Raises as `conv3`.
    """
    launcher = launcher or load()
    if not dys:
        raise ValueError("dys: need at least one map")
    check_dense_maps("dys", dys, dys[0], launcher)
    _check_weight(weight, dys[0])
    if len(weight) != len(dys):
        raise ValueError(f"weight: {len(weight)} convolutions, {len(dys)} gradients")
    images, _, height, width = dys[0].shape
    dx = empty_map((images, weight.shape[-1], height, width), dys[0])
    if mask is not None:
        check_dense_maps("mask", [mask], dx, launcher)
    _launch(dys, weight, [dx], mask, mirrored=True, launcher=launcher)
    return dx


def _check_weight(weight: Tensor, x: Tensor) -> None:
    if weight.ndim != 5 or not len(weight):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, need (B, 3, 3, {x.shape[1]}, n)")
    wanted = (len(weight), 3, 3, x.shape[1], weight.shape[-1])
    check_dense("weight", weight, wanted, torch.float32, x.device)


def _tile(outputs: int) -> tuple[int, int]:
    """The first of the tiles of which the fewest outputs lie past the last channel."""

    def padded(tile: tuple[int, int]) -> int:
        own = 4 * tile[0] * tile[1]
        return -(-outputs // own) * own

    return min(instances.CONV3_TILES, key=padded)


def _launch(
    xs: Sequence[Tensor],
    weight: Tensor,
    ys: Sequence[Tensor],
    mask: Tensor | None,
    *,
    launcher: Launcher,
    relu: bool = False,
    mirrored: bool = False,
) -> None:
    images, channels, height, width = xs[0].shape
    outputs = ys[0].shape[1]
    masks = [] if mask is None else [mask]
    reason = refusal(xs[0].dtype, xs[0].shape, outputs)
    if reason is None and len(weight) > MOST_CONVOLUTIONS:
        reason = f"{len(weight)} convolutions, at most {MOST_CONVOLUTIONS}"
    if reason is None and any(one.data_ptr() % 16 for one in (*xs, weight, *masks)):
        reason = "addresses that are no multiples of 16"
    if reason is not None:
        raise ValueError(f"x: no kernel for this, {reason}")
    of_thread, across = _tile(outputs)
    tiles = len(ys) * -(-outputs // (4 * of_thread * across))
    grid = (tiles * -(-images * height * (width + 1) * across // POSITIONS), 1, 1)
    check_grid("x", grid)
    of_maps = [
        [one.data_ptr() for one in maps] + [0] * (MOST_CONVOLUTIONS - len(maps))
        for maps in (xs, ys)
    ]
    arguments = pack(
        ARGUMENTS,
        (
            *of_maps,
            weight.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            *(len(xs), channels, outputs, images),
            *(height, width, int(relu), int(mirrored), tiles),
        ),
    )
    instance = instances.conv3(of_thread, across)
    launcher.launch(instance, grid, (THREADS, 1, 1), arguments, xs[0].device)

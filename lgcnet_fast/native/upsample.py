"""Launchers of csrc/upsample.cuh: bilinear resizing (align_corners=True) into and out of slices.

Reading and writing each map once is the floor: x + y forward, dy + dx backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.instances import Instance
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import (
    STORAGE,
    VIEW,
    block_of,
    check_map,
    check_output,
    check_same,
    empty_map,
    pack,
    view_of,
    widest_vector,
)

ARGUMENTS = np.dtype(
    [
        ("source", VIEW),
        ("target", VIEW),
        ("channels", "i4"),
        ("source_height", "i4"),
        ("source_width", "i4"),
        ("target_height", "i4"),
        ("target_width", "i4"),
        ("channel_tiles", "i4"),
    ],
    align=True,
)

AXIS_ARGUMENTS = np.dtype(
    [
        ("from", VIEW),
        ("to", VIEW),
        ("targets", "i4"),
        ("sources", "i4"),
        ("pixels", "i4"),
        ("channels", "i4"),
        ("channel_tiles", "i4"),
    ],
    align=True,
)

THREADS = 256
ROWS = 4
"""kUpsampleRows of the kernel."""
LANES = 8
"""kGatherLanes of the kernel."""
LONG_SUPPORT = 16
"""Targets an axis of one source from which on the backward takes one axis at a time."""


def upsample_forward(
    x: Tensor,
    size: tuple[int, int],
    *,
    out: Tensor | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """x resized to `size` (height, width), a copy where that is its size.

    x: (N, C, h, w) float32, float16 or bfloat16, NHWC or a slice of its channels; the result and
    `out`, which may be a slice of channels: (N, C, *size) in the dtype of x. Raises `ValueError`
    for arguments that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    check_map("x", x, launcher)
    _check_size(size)
    shape = (*x.shape[:2], *size)
    y = empty_map(shape, x) if out is None else out
    if out is not None:
        check_output("out", out, shape, x)
    wide, _, single = instances.vectors(STORAGE[x.dtype])
    vector = widest_vector((wide, single), x, y)
    instance = instances.upsample_forward(STORAGE[x.dtype], vector)
    _launch_pixels(instance, vector, x, y, (size[1], -(-size[0] // ROWS)), launcher)
    return y


def upsample_backward(
    dy: Tensor,
    size: tuple[int, int],
    *,
    out: Tensor | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """The gradient of `upsample_forward` to its x of `size` (height, width).

    dy: (N, C, H, W), NHWC or a slice of its channels; the result and `out`: (N, C, *size) in the
    dtype of dy. The same inputs give the same bits. Raises as `upsample_forward`.
    """
    launcher = launcher or load()
    check_map("dy", dy, launcher)
    _check_size(size)
    shape = (*dy.shape[:2], *size)
    dx = empty_map(shape, dy) if out is None else out
    if out is not None:
        check_output("out", out, shape, dy)
    if _longest_support(dx, dy) > LONG_SUPPORT:
        _backward_by_axes(dy, dx, launcher)
        return dx
    wide, _, single = instances.vectors(STORAGE[dy.dtype])
    vector = widest_vector((wide, single), dy, dx)
    instance = instances.upsample_backward(STORAGE[dy.dtype], vector)
    _launch_pixels(instance, vector, dx, dy, (size[1], size[0]), launcher)
    return dx


def concat_upsample_forward(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    *,
    out: Tensor | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """Maps (N, C_i, h_i, w_i), each resized to `size`, side by side: (N, sum of C_i, *size).

    Raises as `upsample_forward`.
    """
    if not maps:
        raise ValueError("maps: none given")
    shape = (maps[0].shape[0], sum(one.shape[1] for one in maps), *size)
    whole = empty_map(shape, maps[0]) if out is None else out
    if out is not None:
        check_same("out", out, shape, maps[0].dtype, maps[0].device)
    slices = whole.split([one.shape[1] for one in maps], dim=1)
    for one, part in zip(maps, slices, strict=True):
        upsample_forward(one, size, out=part, launcher=launcher)
    return whole


def concat_upsample_backward(
    dy: Tensor,
    channels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    *,
    launcher: Launcher | None = None,
) -> list[Tensor]:
    """The gradients of `concat_upsample_forward` to its maps of these channels and sizes."""
    if sum(channels) != dy.shape[1] or len(channels) != len(sizes):
        raise ValueError(
            f"channels: {list(channels)} with {len(sizes)} sizes for dy of {dy.shape[1]} channels"
        )
    return [
        upsample_backward(part, size, launcher=launcher)
        for part, size in zip(dy.split(list(channels), dim=1), sizes, strict=True)
    ]


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1 or max(size) > 2**15:
        raise ValueError(f"size: {size} is not (height, width) between 1 and {2**15}")


def _launch_pixels(
    instance: Instance,
    vector: int,
    source: Tensor,
    target: Tensor,
    extent: tuple[int, int],
    launcher: Launcher,
) -> None:
    """One thread for each channel vector and each of `extent` (columns, blocks of rows)."""
    images, channels = source.shape[:2]
    across, pixels, tiles = block_of(channels // vector, THREADS)
    grid = (-(-extent[0] // pixels), extent[1], images * tiles)
    check_grid(instance.kernel, grid)
    fields = (
        *(view_of(source), view_of(target), channels),
        *(*source.shape[2:], *target.shape[2:], tiles),
    )
    arguments = pack(ARGUMENTS, fields)
    launcher.launch(instance, grid, (across, pixels, 1), arguments, source.device)


def _longest_support(source: Tensor, target: Tensor) -> int:
    """About how many targets along an axis a source contributes to."""
    axes = zip(source.shape[2:], target.shape[2:], strict=True)
    return max(-(-2 * targets // max(1, sources - 1)) for sources, targets in axes)


def _backward_by_axes(dy: Tensor, dx: Tensor, launcher: Launcher) -> None:
    """Rows of dy into a float32 (N, C, h, W) buffer, then its columns into dx."""
    between = empty_map((*dx.shape[:3], dy.shape[3]), dy, torch.float32)
    _gather_rows(dy, between, launcher)
    _gather_rows(between.transpose(2, 3), dx.transpose(2, 3), launcher)


def _gather_rows(dy: Tensor, dx: Tensor, launcher: Launcher) -> None:
    """dx: (N, C, h, W) from dy: (N, C, H, W)."""
    images, channels, sources, pixels = dx.shape
    vector = widest_vector((4, 1), dy, dx)
    across, beside, tiles = block_of(channels // vector, THREADS // LANES)
    grid = (-(-pixels // beside) * tiles, sources, images)
    check_grid("upsample_backward_axis", grid)
    fields = (view_of(dy), view_of(dx), dy.shape[2], sources, pixels, channels, tiles)
    instance = instances.upsample_backward_axis(STORAGE[dy.dtype], STORAGE[dx.dtype], vector)
    arguments = pack(AXIS_ARGUMENTS, fields)
    launcher.launch(instance, grid, (across, beside, LANES), arguments, dy.device)

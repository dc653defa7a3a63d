"""Launchers of csrc/depthwise.cuh: depthwise 3x3 convolution with dilation, forward and backward.

Reading and writing each map once is the floor: x + y forward, x + dy + dx backward.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from lgcnet_fast.native.sums import sum_partials

_SIZES = [(f"{side}_{axis}", "i4") for side in ("in", "out") for axis in ("height", "width")]

FORWARD_ARGUMENTS = np.dtype(
    [
        ("x", VIEW),
        ("y", VIEW),
        ("weight", "u8"),
        ("channels", "i4"),
        *_SIZES,
        ("dilation", "i4"),
        ("relu", "i4"),
        ("channel_tiles", "i4"),
    ],
    align=True,
)

BACKWARD_ARGUMENTS = np.dtype(
    [
        ("x", VIEW),
        ("dy", VIEW),
        ("dx", VIEW),
        ("weight", "u8"),
        ("partial", "u8"),
        ("images", "i4"),
        ("channels", "i4"),
        *_SIZES,
        ("dilation", "i4"),
        ("relu", "i4"),
        ("accumulate", "i4"),
        ("row_groups", "i4"),
    ],
    align=True,
)

BACKWARD_THREADS = 256
"""kBackwardThreads of the kernels: the most that a block may have."""


@dataclass(frozen=True)
class Tile:
    """How a launch divides the work."""

    vector: int
    """Channels a thread."""
    columns: int
    rows: int
    """Outputs that a thread walks over, `rows` x `columns`, each a dilation apart."""
    threads: int
    """Threads a block, at most."""
    blocks: int = 4
    """Backward: blocks a multiprocessor; each block writes one partial weight gradient."""


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    *,
    dilation: int = 1,
    stride: int = 1,
    relu: bool = False,
    out: Tensor | None = None,
    tile: Tile | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """y = depthwise convolution of x, or of relu(x), with padding = dilation.

    x: (N, C, H, W) float32, float16 or bfloat16, NHWC or a slice of its channels; weight: (3, 3, C)
    float32, contiguous; y and `out`: (N, C, ceil(H / stride), ceil(W / stride)) in the dtype of x.
    Raises `ValueError` for arguments that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    shape = _check(x, weight, dilation, stride, launcher)
    y = empty_map(shape, x) if out is None else out
    if out is not None:
        check_output("out", out, shape, x)
    seen, dilation, stride = even_pixels(x, dilation, stride)
    tile = tile or forward_tile(seen, y)
    instance = instances.depthwise_forward(
        STORAGE[x.dtype], tile.vector, stride, tile.columns, tile.rows
    )
    _check_tile(tile, instance, _forward_threads(x.dtype, tile.vector), seen, y)

    images, channels, out_height, out_width = shape
    across, pixels, tiles = block_of(channels // tile.vector, tile.threads)
    grid = (
        -(-walks(out_width, dilation, tile.columns) // pixels),
        walks(out_height, dilation, tile.rows),
        images * tiles,
    )
    check_grid("depthwise_forward", grid)
    fields = (
        *(view_of(seen), view_of(y), weight.data_ptr(), channels),
        *(*seen.shape[2:], out_height, out_width, dilation, int(relu), tiles),
    )
    arguments = pack(FORWARD_ARGUMENTS, fields)
    launcher.launch(instance, grid, (across, pixels, 1), arguments, x.device)
    return y


def depthwise_backward(
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    *,
    dilation: int = 1,
    stride: int = 1,
    relu: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    tile: Tile | None = None,
    launcher: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `depthwise_forward` to x and weight, in one pass over x and dy.

    dy: as y there; `out` takes dx, added to what it holds with `accumulate`, as for the branches of
    one x. Returns dx, shaped and typed as x, and dw, (3, 3, C) float32. The same inputs give the
    same bits on the same kind of GPU. Raises as `depthwise_forward`.
    """
    launcher = launcher or load()
    shape = _check(x, weight, dilation, stride, launcher)
    check_map("dy", dy, launcher)
    check_same("dy", dy, shape, x.dtype, x.device)
    if out is None and accumulate:
        raise ValueError("accumulate: there is no `out` to add to")
    dx = empty_map(tuple(x.shape), x) if out is None else out
    if out is not None:
        check_output("out", out, tuple(x.shape), x)
    seen, dilation_seen, stride_seen = even_pixels(x, dilation, stride)
    written = dx
    if stride_seen != stride:  # the other pixels have no gradient
        written = (dx if accumulate else dx.zero_())[:, :, ::2, ::2]
    tile = tile or backward_tile(seen, dy, written, stride_seen)
    instance = _backward_instance(STORAGE[x.dtype], tile, stride_seen)
    _check_tile(tile, instance, BACKWARD_THREADS, seen, dy, written)

    images, channels, height, width = seen.shape
    if stride_seen == 2:  # walks of one 2 x 2 square
        columns, rows = -(-width // 2), -(-height // 2)
    else:
        columns = walks(width, dilation_seen, tile.columns)
        rows = walks(height, dilation_seen, tile.rows)
    across, pixels, tiles = block_of(channels // tile.vector, tile.threads)
    column_blocks = -(-columns // pixels)
    wanted = -(-launcher.processors(x.device) * tile.blocks // (column_blocks * tiles))
    workers = min(wanted, images * rows)
    grid = (column_blocks, workers, tiles)
    check_grid("depthwise_backward", grid)
    partial = weight.new_empty(workers * column_blocks, 3, 3, channels)
    fields = (
        *(view_of(seen), view_of(dy), view_of(written), weight.data_ptr(), partial.data_ptr()),
        *(images, channels, height, width, *shape[2:], dilation_seen, int(relu)),
        *(int(accumulate), rows),
    )
    arguments = pack(BACKWARD_ARGUMENTS, fields)
    launcher.launch(instance, grid, (across, pixels, 1), arguments, x.device)
    return dx, sum_partials(partial, launcher)


def forward_tile(x: Tensor, y: Tensor) -> Tile:
    """Default division of the forward: 8 bytes of channels a thread, 4 x 2 outputs a walk."""
    _, narrow, single = instances.vectors(STORAGE[x.dtype])
    return Tile(widest_vector((narrow, single), x, y), columns=2, rows=4, threads=256)


def backward_tile(x: Tensor, dy: Tensor, dx: Tensor, stride: int) -> Tile:
    """Default division of the backward: narrower vectors, for it holds 18 numbers a channel."""
    vector = widest_vector((2, 1), x, dy, dx)
    return Tile(vector, columns=1 if stride == 2 else 2, rows=4, threads=128)


def _check(
    x: Tensor, weight: Tensor, dilation: int, stride: int, launcher: Launcher
) -> tuple[int, int, int, int]:
    """The shape of the output."""
    check_map("x", x, launcher)
    images, channels, height, width = x.shape
    check_same("weight", weight, (3, 3, channels), torch.float32, x.device)
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        raise ValueError(f"weight: strides {weight.stride()}, need a contiguous, aligned tensor")
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride} is neither 1 nor 2")
    if not 1 <= dilation < 2**15:
        raise ValueError(f"dilation: {dilation} is not between 1 and {2**15 - 1}")
    return images, channels, -(-height // stride), -(-width // stride)


def _forward_threads(dtype: torch.dtype, vector: int) -> int:
    """kForwardThreads of the kernels."""
    return 256 if vector * dtype.itemsize > 8 else 512


def _check_tile(tile: Tile, instance: Instance, threads: int, *maps: Tensor) -> None:
    if instance not in instances.all_instances():
        raise ValueError(f"tile: {tile} has no compiled kernel {instance.expression}")
    if not 1 <= tile.threads <= threads or tile.blocks < 1:
        raise ValueError(f"tile: {tile} needs 1 to {threads} threads and some blocks")
    widest_vector((tile.vector,), *maps)


def even_pixels(x: Tensor, dilation: int, stride: int) -> tuple[Tensor, int, int]:
    """(x, dilation, stride) of an equal convolution that skips no input.

    At stride 2 and even dilation every tap falls on even rows and columns, so that the convolution
    is one of stride 1 and half the dilation over those.
    """
    if stride == 2 and dilation % 2 == 0:
        return x[:, :, ::2, ::2], dilation // 2, 1
    return x, dilation, stride


def walks(extent: int, dilation: int, length: int) -> int:
    """Walks of `length` positions, a dilation apart, that cover an axis."""
    phases = min(dilation, extent)
    positions = -(-extent // dilation)
    return phases * -(-positions // length)


def _backward_instance(storage: str, tile: Tile, stride: int) -> Instance:
    if stride == 2:
        return instances.depthwise_backward_stride2(storage, tile.vector)
    return instances.depthwise_backward(storage, tile.vector, tile.columns, tile.rows)

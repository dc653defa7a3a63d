"""Launchers of csrc/max_pool.cuh: 3x3 max pooling with padding 1, forward and backward.

Reading and writing each map once is the floor: x + y forward, x + dy + dx backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
        *[(name, VIEW) for name in ("x", "y", "dx")],
        ("channels", "i4"),
        *[(f"{side}_{axis}", "i4") for side in ("in", "out") for axis in ("height", "width")],
        ("rows", "i4"),
        ("channel_tiles", "i4"),
    ],
    align=True,
)

THREADS = 256
"""kPoolThreads of the kernels: the most that a block may have."""

WALKS = 448
"""Threads on a multiprocessor, each of which walks: enough to work while others wait for memory."""


@dataclass(frozen=True)
class Tile:
    """How a launch divides the work."""

    vector: int
    """Channels a thread."""
    rows: int
    """Windows that a thread walks down."""
    threads: int
    """Threads a block, at most."""


def max_pool_forward(
    x: Tensor,
    stride: int = 1,
    *,
    out: Tensor | None = None,
    tile: Tile | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)), in the dtype of x.

    x and `out`: NHWC or slices of channels, float32, float16 or bfloat16. Raises `ValueError` for
    arguments that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    shape = _check(x, stride, launcher)
    y = empty_map(shape, x) if out is None else out
    if out is not None:
        check_output("out", out, shape, x)
    tile = tile or forward_tile(x, y, launcher)
    instance = instances.max_pool_forward(STORAGE[x.dtype], tile.vector, stride)
    _launch(instance, tile, x, y, None, launcher)
    return y


def max_pool_backward(
    x: Tensor,
    dy: Tensor,
    stride: int = 1,
    *,
    out: Tensor | None = None,
    tile: Tile | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """dx, shaped and typed as x, from x and the gradient of `max_pool_forward`.

    `out` takes dx. Sums are rounded once. The same inputs give the same bits. Raises as
    `max_pool_forward`.
    """
    launcher = launcher or load()
    shape = _check(x, stride, launcher)
    check_map("dy", dy, launcher)
    check_same("dy", dy, shape, x.dtype, x.device)
    dx = empty_map(tuple(x.shape), x) if out is None else out
    if out is not None:
        check_output("out", out, tuple(x.shape), x)
    tile = tile or backward_tile(x, dy, dx, launcher)
    instance = instances.max_pool_backward(STORAGE[x.dtype], tile.vector, stride)
    _launch(instance, tile, x, dy, dx, launcher)
    return dx


def forward_tile(x: Tensor, y: Tensor, launcher: Launcher | None = None) -> Tile:
    """Default division of the forward: 16 bytes of channels a thread."""
    wide, _, single = instances.vectors(STORAGE[x.dtype])
    vector = widest_vector((wide, single), x, y)
    return Tile(vector, _rows(y, vector, launcher or load()), threads=256)


def backward_tile(x: Tensor, dy: Tensor, dx: Tensor, launcher: Launcher | None = None) -> Tile:
    """Default division of the backward: narrower vectors, for a thread keeps three rows."""
    vector = widest_vector((4, 2, 1), x, dy, dx)
    return Tile(vector, _rows(dy, vector, launcher or load()), threads=128)


def _rows(y: Tensor, vector: int, launcher: Launcher) -> int:
    """Of a walk, which reads two to four rows more than it has windows: as many as leave a GPU
    walks enough."""
    images, channels, height, width = y.shape
    threads = WALKS * launcher.processors(y.device)
    rows = 8 if height * width >= 4096 else 4
    while rows > 1 and images * channels // vector * width * -(-height // rows) < threads:
        rows //= 2
    return rows


def _check(x: Tensor, stride: int, launcher: Launcher) -> tuple[int, int, int, int]:
    """The shape of the output."""
    check_map("x", x, launcher)
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride} is neither 1 nor 2")
    images, channels, height, width = x.shape
    return images, channels, -(-height // stride), -(-width // stride)


def _launch(
    instance: Instance, tile: Tile, x: Tensor, y: Tensor, dx: Tensor | None, launcher: Launcher
) -> None:
    """dx: None in the forward."""
    if instance not in instances.all_instances():
        raise ValueError(f"tile: {tile} has no compiled kernel {instance.expression}")
    if not 1 <= tile.threads <= THREADS or tile.rows < 1:
        raise ValueError(f"tile: {tile} needs 1 to {THREADS} threads and some rows")
    gradient = x if dx is None else dx
    widest_vector((tile.vector,), x, y, gradient)
    images, channels, height, width = y.shape
    across, columns, tiles = block_of(channels // tile.vector, tile.threads)
    grid = (-(-width // columns), -(-height // tile.rows), images * tiles)
    check_grid(instance.kernel, grid)
    fields = (
        *(view_of(x), view_of(y), view_of(gradient), channels),
        *(*x.shape[2:], height, width, tile.rows, tiles),
    )
    launcher.launch(instance, grid, (across, columns, 1), pack(ARGUMENTS, fields), x.device)

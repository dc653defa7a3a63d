"""Launchers of csrc/concat_product.cuh: 1x1 convolutions of concatenations, float32.

Least traffic, in numbers a position, C channels in all: forward C + C_out; backward 2 C + C_out for
the gradients of the maps, where a ReLU needs the maps too, and C + C_out for that of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.instances import Instance
from lgcnet_fast.native.launcher import Extent, Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.mixed_sum import MAPS, MAX_MAPS
from lgcnet_fast.native.operands import (
    check_dense,
    check_map,
    check_same,
    empty_floats,
    empty_map,
    widest_vector,
)
from lgcnet_fast.native.sums import sum_partials

ARGUMENTS = np.dtype(
    [
        ("x", *MAPS),
        ("dx", *MAPS),
        ("channels", "i4", (MAX_MAPS,)),
        *[(name, "u8") for name in ("weight", "dy", "result")],
        *[(name, "i4") for name in ("positions", "share", "maps", "all_channels")],
        *[(name, "i4") for name in ("outputs", "relu", "tiles")],
    ],
    align=True,
)

POSITIONS = 128
"""kProductPositions of the kernels."""
BLOCK = (8, POSITIONS // 8, 1)
SHARE_POSITIONS = 32
"""kSharePositions of the kernels."""
SHARE_BLOCK = (8, 8, 4)
SHARES = 3
"""Of the positions, a multiprocessor: blocks that it holds."""


def concat_product_forward(
    maps: Sequence[Tensor], weight: Tensor, relu: bool, *, launcher: Launcher | None = None
) -> Tensor:
    """The product of `weight` and the maps side by side, or the ReLU of these.

    maps: 1 to 64 of (N, C_i, H, W), dense NHWC; weight: (C_out, sum of C_i), contiguous; the
    result: (N, C_out, H, W); all float32. Raises `ValueError` for arguments that do not fit,
    `DeviceError` without a route.
    """
    launcher = launcher or load()
    shape = _checked(maps, weight, launcher)
    y = empty_map(shape, maps[0])
    vector = _vector(weight, y, *maps)
    width = _width(vector, [len(weight)])
    tiles = _tiles(width, [len(weight)])
    arguments = _arguments(maps, weight, relu, tiles)
    arguments["result"] = y.data_ptr()
    instance = instances.concat_product(vector, width)
    grid = (tiles * -(-_positions(y) // POSITIONS), 1, 1)
    _launch(instance, grid, BLOCK, arguments, launcher, y.device)
    return y


def concat_product_backward(
    dy: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    relu: bool,
    *,
    launcher: Launcher | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of `concat_product_forward` to the maps and to the weight.

    dy: as the result there, dense NHWC. The same inputs give the same bits on the same kind of GPU.
    Raises as `concat_product_forward`.
    """
    launcher = launcher or load()
    shape = _checked(maps, weight, launcher)
    check_map("dy", dy, launcher)
    check_same("dy", dy, shape, torch.float32, maps[0].device)
    _check_dense_map("dy", dy)
    dxs = [empty_map(tuple(x.shape), x) for x in maps]
    channels, positions = [x.shape[1] for x in maps], _positions(dy)
    vector = _vector(weight, dy, *maps)
    width = _width(vector, channels)
    tiles = _tiles(width, channels)
    arguments = _arguments(maps, weight, relu, tiles)
    arguments["dx"][0, : len(maps)] = [dx.data_ptr() for dx in dxs]
    arguments["dy"] = dy.data_ptr()
    instance = instances.concat_product_gradients(vector, width)
    grid = (tiles * -(-positions // POSITIONS), 1, 1)
    _launch(instance, grid, BLOCK, arguments, launcher, dy.device)

    tiles_of_dw = tiles * _tiles(width, [len(weight)])
    wanted = max(1, launcher.processors(dy.device) * SHARES // tiles_of_dw)
    share = -(-positions // (wanted * SHARE_POSITIONS)) * SHARE_POSITIONS
    shares = -(-positions // share)
    partial = empty_floats(dy, shares, *weight.shape)
    arguments["share"], arguments["result"] = share, partial.data_ptr()
    instance = instances.concat_product_weight_gradients(vector, width)
    _launch(instance, (tiles_of_dw, shares, 1), SHARE_BLOCK, arguments, launcher, dy.device)
    return dxs, sum_partials(partial, launcher)


def _checked(
    maps: Sequence[Tensor], weight: Tensor, launcher: Launcher
) -> tuple[int, int, int, int]:
    """The shape of the result."""
    if not 1 <= len(maps) <= MAX_MAPS:
        raise ValueError(f"maps: {len(maps)} given, a launch takes 1 to {MAX_MAPS}")
    for index, x in enumerate(maps):
        name = f"maps[{index}]"
        check_map(name, x, launcher)
        shape = (maps[0].shape[0], x.shape[1], *maps[0].shape[2:])
        check_same(name, x, shape, torch.float32, maps[0].device)
        _check_dense_map(name, x)
    if weight.ndim != 2 or not weight.shape[0]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, need (C_out, sum of C_i)")
    outputs, channels = weight.shape[0], sum(x.shape[1] for x in maps)
    check_dense("weight", weight, (outputs, channels), torch.float32, maps[0].device)
    if max(weight.shape) >= 2**24:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, at most {2**24 - 1} channels fit")
    images, _, height, width = maps[0].shape
    if images * height * width >= 2**31:
        raise ValueError(f"maps[0]: {images * height * width} positions, at most {2**31 - 1} fit")
    return images, outputs, height, width


def _check_dense_map(name: str, x: Tensor) -> None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are not dense NHWC"
        )


def _positions(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _vector(weight: Tensor, *maps: Tensor) -> int:
    """Numbers that a thread reads at once: of rows of the weight too, at every map's first."""
    return widest_vector((4, 1) if weight.data_ptr() % 16 == 0 else (1,), *maps)


def _width(vector: int, channels: Sequence[int]) -> int:
    """Columns a block, of which the fewest lie past the channels."""
    widths = [width for one, width in instances.CONCAT_TILES if one == vector]
    return min(widths, key=lambda width: width * _tiles(width, channels))


def _tiles(width: int, channels: Sequence[int]) -> int:
    return sum(-(-one // width) for one in channels)


def _arguments(maps: Sequence[Tensor], weight: Tensor, relu: bool, tiles: int) -> np.ndarray:
    """Without what only some launches have; `tiles`: of channels, beside each other in the grid."""
    arguments = np.zeros(1, ARGUMENTS)
    arguments["x"][0, : len(maps)] = [x.data_ptr() for x in maps]
    arguments["channels"][0, : len(maps)] = [x.shape[1] for x in maps]
    arguments["weight"], arguments["positions"] = weight.data_ptr(), _positions(maps[0])
    arguments["maps"], arguments["outputs"] = len(maps), weight.shape[0]
    arguments["all_channels"], arguments["relu"] = weight.shape[1], int(relu)
    arguments["tiles"] = tiles
    return arguments


def _launch(
    instance: Instance,
    grid: Extent,
    block: Extent,
    arguments: np.ndarray,
    launcher: Launcher,
    device: torch.device,
) -> None:
    check_grid(instance.kernel, grid)
    launcher.launch(instance, grid, block, arguments, device)

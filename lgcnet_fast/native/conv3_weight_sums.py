"""Launcher of csrc/conv3_weight_sums.cuh: weight gradients of dense 3x3 convolutions, float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import check_dense_maps, check_same, empty_floats, pack

MOST_CONVOLUTIONS = 12
"""kMostSummedConvolutions of the kernel."""
MOST_POSITIONS = 2**30
"""With the columns of zeros."""
FEWEST_POSITIONS = 512
"""Of a part, where there are so many."""

ARGUMENTS = np.dtype(
    [
        *[(name, "u8", (MOST_CONVOLUTIONS,)) for name in ("x", "dy")],
        ("shares", "u8"),
        *[(name, "i4") for name in ("convolutions", "channels", "out_channels", "height")],
        *[(name, "i4") for name in ("width", "pixels", "part", "relu")],
        *[(name, "i4") for name in ("step_rows", "step_columns", "step_pixels")],
    ],
    align=True,
)


@dataclass(frozen=True)
class Tile:
    """What the kernel has for tiles of so many channels; see struct Conv3SumsTile."""

    threads: int
    blocks: int
    """Of a multiprocessor."""
    walks: int
    chunk: int
    """Positions that a walk goes at once."""


TILES = dict(
    zip(
        instances.SUMS_TILES,
        (Tile(128, 3, 1, 16), Tile(128, 3, 4, 8), Tile(96, 4, 1, 16)),
        strict=True,
    )
)
"""By channels of x and of dy, the best first."""


@dataclass(frozen=True)
class Plan:
    """How blocks go over convolutions of one size."""

    channels: int
    """Of a tile, of both kinds: one of TILES."""
    blocks: int
    """Of a part."""
    part: int
    """Positions, with the columns of zeros."""
    parts: int

    @property
    def tile(self) -> Tile:
        return TILES[self.channels]


@cache
def plan(
    convolutions: int, shape: tuple[int, int, int, int], out_channels: int, processors: int
) -> Plan:
    """For maps x of this shape, (N, C, H, W), so that all blocks have room at once."""
    images, channels, height, width = shape
    side = _tile(channels, out_channels)
    if side is None:
        raise ValueError(f"no tile for {channels} and {out_channels} channels")
    tile = TILES[side]
    blocks = convolutions * 3 * (channels // side) * (out_channels // side)
    positions = images * height * (width + 1)
    wanted = max(1, min(processors * tile.blocks // blocks, positions // FEWEST_POSITIONS))
    step = tile.walks * tile.chunk
    part = -(-positions // (wanted * step)) * step
    return Plan(side, blocks, part, -(-positions // part))


def _tile(channels: int, out_channels: int) -> int | None:
    """The best that divides both."""
    return next((one for one in TILES if channels % one == out_channels % one == 0), None)


def refusal(dtype: torch.dtype, shape: Sequence[int], out_channels: int) -> str | None:
    """Why the kernel cannot serve convolutions of such maps, (N, C, H, W), to so many channels."""
    images, channels, height, width = shape
    if dtype != torch.float32:
        return f"{dtype}, need torch.float32"
    if _tile(channels, out_channels) is None:
        return f"{channels} and {out_channels} channels, not both multiples of 32 or of 48"
    if images * height * (width + 1) > MOST_POSITIONS:
        return f"{images} x {height} x {width + 1} positions, at most {MOST_POSITIONS} fit"
    return None


def conv3_weight_sums(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    *,
    relu: bool = False,
    launcher: Launcher | None = None,
) -> Tensor:
    """The weight gradients, (B, C_out, 3, 3, C), float32.

    dys: the gradients of B convolutions, at most 12, (N, C_out, H, W); xs: their maps,
    (N, C, H, W); all dense NHWC, float32, C and C_out both multiples of 32 or of 48; relu: the
    convolutions are of relu(x). Same bits on every run on the same kind of GPU. Raises
    `ValueError` naming the argument at fault, `DeviceError` without a route.
    """
    launcher = launcher or load()
    if not xs or len(dys) != len(xs):
        raise ValueError(f"dys: {len(dys)} maps, xs: {len(xs)}, need as many and at least one")
    check_dense_maps("xs", xs, xs[0], launcher)
    images, channels, height, width = xs[0].shape
    check_dense_maps("dys", dys, dys[0], launcher)
    out_channels = dys[0].shape[1]
    wanted = images, out_channels, height, width
    check_same("dys[0]", dys[0], wanted, xs[0].dtype, xs[0].device)
    reason = refusal(xs[0].dtype, xs[0].shape, out_channels)
    if reason is None and len(xs) > MOST_CONVOLUTIONS:
        reason = f"{len(xs)} convolutions, at most {MOST_CONVOLUTIONS}"
    if reason is None and any(one.data_ptr() % 16 for one in (*dys, *xs)):
        reason = "a map whose address is no multiple of 16"
    if reason is not None:
        raise ValueError(f"xs: no kernel for this, {reason}")
    shape = images, channels, height, width
    found = plan(len(xs), shape, out_channels, launcher.processors(xs[0].device))
    shares = empty_floats(xs[0], found.parts, len(xs), out_channels, 3, 3, channels)
    rows, columns = divmod(found.tile.chunk // 2, width + 1)
    none = [0] * (MOST_CONVOLUTIONS - len(xs))
    addresses = [[one.data_ptr() for one in maps] + none for maps in (xs, dys)]
    sizes = len(xs), channels, out_channels, height, width, images * height * width
    step = rows % height, columns, found.tile.chunk // 2 - rows
    arguments = pack(
        ARGUMENTS, (*addresses, shares.data_ptr(), *sizes, found.part, int(relu), *step)
    )
    grid = (found.parts * found.blocks, 1, 1)
    check_grid("xs", grid)
    instance = instances.conv3_weight_sums(found.channels)
    launcher.launch(instance, grid, (found.tile.threads, 1, 1), arguments, xs[0].device)
    return shares.sum(0)

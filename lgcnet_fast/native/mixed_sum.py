"""Launchers of csrc/batch_statistics.cuh and, forward, of csrc/mixed_sum.cuh: a mixed node.

Least traffic of K branches and J plain terms, in maps: K for the statistics, K + J + 1 for the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Extent, Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import (
    STORAGE,
    block_of,
    check_dense,
    check_dense_maps,
    empty_floats,
    empty_map,
    pack,
    widest_vector,
)

MAX_MAPS = 64
"""kMaxMaps of the kernels: branches and plain terms of one node."""
THREADS = 256
WRITTEN_POSITIONS = 4
"""kWrittenPositions of the kernels."""
MOST_TILES = 512
"""Tiles of a map that `batch_statistics` merges at most."""

MAPS = ("u8", (MAX_MAPS,))

STATISTICS_ARGUMENTS = np.dtype(
    [
        ("maps", *MAPS),
        ("partial", "u8"),
        ("positions", "i8"),
        ("count", "i4"),
        ("channels", "i4"),
        ("rounds", "i4"),
    ],
    align=True,
)

MERGE_ARGUMENTS = np.dtype(
    [
        *[(name, "u8") for name in ("partial", "mean", "variance", "inverse_deviation")],
        ("positions", "i8"),
        ("tile_size", "i8"),
        ("tiles", "i4"),
        ("width", "i4"),
        ("eps", "f4"),
    ],
    align=True,
)

SUM_ARGUMENTS = np.dtype(
    [
        ("maps", *MAPS),
        *[(name, "u8") for name in ("z", "plain_z", "mean", "inverse_deviation", "out")],
        ("positions", "i8"),
        *[(name, "i4") for name in ("branches", "plain", "channels")],
    ],
    align=True,
)


@dataclass(frozen=True)
class Statistics:
    """Of K maps, each (K, C) float32 and contiguous."""

    mean: Tensor
    variance: Tensor
    """Biased, for the running statistics; the sums need only the other two."""
    inverse_deviation: Tensor
    """r = 1 / sqrt(variance + eps)."""


@dataclass(frozen=True)
class Positions:
    """How a launch divides the positions and channels of dense maps."""

    count: int
    channels: int
    vector: int
    """Channels a thread."""
    block: Extent
    """Channel vectors, rows of positions."""
    channel_tiles: int

    @classmethod
    def of(cls, maps: Sequence[Tensor], *statistics: Tensor) -> Positions:
        """statistics: float32 with the channels last, read in the same vectors as the maps."""
        wide, _, single = instances.vectors(STORAGE[maps[0].dtype])
        aligned = all(one.data_ptr() % 16 == 0 for one in statistics)
        vector = widest_vector((wide, single) if aligned else (single,), *maps)
        channels = maps[0].shape[1]
        across, rows, tiles = block_of(channels // vector, THREADS)
        return cls(maps[0].numel() // channels, channels, vector, (across, rows, 1), tiles)

    @property
    def reduced(self) -> int:
        """kReducedPositions of the kernels: positions a thread of a reduction."""
        return 4 if self.vector > 4 else 8

    def tiles(self, positions_a_thread: int) -> int:
        return -(-self.count // (positions_a_thread * self.block[1]))


def batch_statistics(
    ys: Sequence[Tensor],
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
    launcher: Launcher | None = None,
) -> Statistics:
    """Statistics of each map over its N H W positions.

    ys: K maps (N, C, H, W), dense NHWC, of one shape and dtype; out: (3, K, C) float32, contiguous,
    to hold the mean, variance and inverse deviation. Raises `ValueError` for other arguments and
    for a single value a channel, which has no variance; `DeviceError` without a route.
    """
    launcher = launcher or load()
    check_maps("ys", ys, ys[0] if ys else None, launcher)
    work, count = Positions.of(ys), len(ys)
    if work.count == 1:
        raise ValueError(f"ys: one value a channel in shape {tuple(ys[0].shape)}, need more")
    rounds = -(-work.tiles(work.reduced) // MOST_TILES)
    tiles = work.tiles(work.reduced * rounds)
    partial = empty_floats(ys[0], tiles, 2, count, work.channels)
    if out is None:
        out = empty_floats(ys[0], 3, count, work.channels)
    check_dense("out", out, (3, count, work.channels), torch.float32, ys[0].device)
    statistics = Statistics(*out.unbind())
    grid = (tiles, work.channel_tiles, count)
    check_grid("tile_statistics", grid)
    launcher.launch(
        instances.tile_statistics(STORAGE[ys[0].dtype], work.vector),
        grid,
        work.block,
        pack(
            STATISTICS_ARGUMENTS,
            (addresses(ys), partial.data_ptr(), work.count, count, work.channels, rounds),
        ),
        ys[0].device,
    )
    tile_size = rounds * work.reduced * work.block[1]
    _merge(partial, statistics, work.count, tile_size, eps, launcher)
    return statistics


def mixed_sum(
    ys: Sequence[Tensor],
    z: Tensor,
    statistics: Statistics,
    xs: Sequence[Tensor] = (),
    plain_z: Tensor | None = None,
    *,
    launcher: Launcher | None = None,
) -> Tensor:
    """sum_k z_k r_k (y_k - mean_k) + sum_j zp_j x_j; like ys[0].

    ys: K >= 1 maps (N, C, H, W), dense NHWC; z: (K,), contiguous; statistics: of the ys; xs: J
    plain maps like ys; plain_z: (J,), contiguous. Weights of any float dtype. Raises `ValueError`
    naming the argument at fault.
    """
    launcher = launcher or load()
    check_maps("ys", ys, ys[0] if ys else None, launcher)
    check_maps("xs", xs, ys[0], launcher, beside=len(ys))
    z, plain_z = checked_weights(z, plain_z, ys, len(xs))
    check_statistics(statistics, ys)
    out = empty_map(tuple(ys[0].shape), ys[0])
    work = Positions.of((*ys, *xs), statistics.mean, statistics.inverse_deviation)
    fields = (
        addresses((*ys, *xs)),
        *(z.data_ptr(), plain_z.data_ptr()),
        *(statistics.mean.data_ptr(), statistics.inverse_deviation.data_ptr(), out.data_ptr()),
        *(work.count, len(ys), len(xs), work.channels),
    )
    grid = (work.tiles(WRITTEN_POSITIONS), work.channel_tiles, 1)
    check_grid("mixed_sum", grid)
    instance = instances.mixed_sum(STORAGE[out.dtype], work.vector)
    launcher.launch(instance, grid, work.block, pack(SUM_ARGUMENTS, fields), out.device)
    return out


def check_maps(
    name: str, maps: Sequence[Tensor], like: Tensor | None, launcher: Launcher, beside: int = 0
) -> None:
    """Raises `ValueError` unless these maps fit `like`, and together with `beside` others."""
    check_dense_maps(name, maps, like, launcher)
    if len(maps) + beside > MAX_MAPS:
        raise ValueError(f"{name}: {len(maps) + beside} maps at one node, at most {MAX_MAPS}")


def checked_weights(
    z: Tensor, plain_z: Tensor | None, ys: Sequence[Tensor], plain: int
) -> tuple[Tensor, Tensor]:
    """Both weights in float32; the plain ones may be none. Raises `ValueError`."""
    if plain_z is None:
        plain_z = z.new_empty(0)
    for name, weights, count in (("z", z, len(ys)), ("plain_z", plain_z, plain)):
        check_dense(name, weights, (count,), weights.dtype, ys[0].device)
    return z.float(), plain_z.float()


def check_statistics(statistics: Statistics, ys: Sequence[Tensor]) -> None:
    """Raises `ValueError` unless mean and inverse deviation are (K, C) float32."""
    shape = (len(ys), ys[0].shape[1])
    for name in ("mean", "inverse_deviation"):
        statistic = getattr(statistics, name)
        check_dense(f"statistics.{name}", statistic, shape, torch.float32, ys[0].device)


def addresses(maps: Sequence[Tensor]) -> list[int]:
    """An array of the kernels' MAPS."""
    return [one.data_ptr() for one in maps] + [0] * (MAX_MAPS - len(maps))


def _merge(
    partial: Tensor,
    statistics: Statistics,
    positions: int,
    tile_size: int,
    eps: float,
    launcher: Launcher,
) -> None:
    """partial: (tiles, 2, K, C), mean and M2 of tiles of `tile_size` positions."""
    width = statistics.mean.numel()
    results = (statistics.mean, statistics.variance, statistics.inverse_deviation)
    fields = (
        *(one.data_ptr() for one in (partial, *results)),
        *(positions, tile_size, partial.shape[0], width, eps),
    )
    grid, block = (-(-width // 32), 1, 1), (32, instances.MERGE_LANES, 1)
    arguments = pack(MERGE_ARGUMENTS, fields)
    launcher.launch(instances.merge_statistics(), grid, block, arguments, partial.device)

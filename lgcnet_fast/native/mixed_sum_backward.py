"""Launchers of csrc/mixed_sum.cuh, backward: the gradients at a mixed node.

One pass reduces g = dout against every map, a second one writes all gradients; under synchronised
batch norm the sums of the ranks are added in between. Least traffic of K branches and J plain
terms, in maps: K + J + 1 for the sums, 2 K + J + 1 for the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.mixed_sum import (
    MAPS,
    WRITTEN_POSITIONS,
    Positions,
    Statistics,
    addresses,
    check_maps,
    check_statistics,
    checked_weights,
)
from lgcnet_fast.native.operands import STORAGE, check_dense, empty_floats, empty_map, pack
from lgcnet_fast.native.sums import sum_partials

SUMS_ARGUMENTS = np.dtype(
    [
        ("maps", *MAPS),
        *[(name, "u8") for name in ("g", "mean", "inverse_deviation", "partial")],
        ("positions", "i8"),
        *[(name, "i4") for name in ("branches", "plain", "channels")],
    ],
    align=True,
)

GRADIENTS_ARGUMENTS = np.dtype(
    [
        ("maps", *MAPS),
        ("gradients", *MAPS),
        *[(name, "u8") for name in ("g", "z", "plain_z", "mean", "inverse_deviation")],
        *[(name, "u8") for name in ("sum", "normalised_sum")],
        ("positions", "i8"),
        *[(name, "i4") for name in ("branches", "plain", "channels")],
        ("share", "f4"),
    ],
    align=True,
)


@dataclass(frozen=True)
class GradientSums:
    """Sums over all positions, float32: of g, g yhat_k and g x_j, per channel."""

    gradient: Tensor
    """(C,): S0."""
    normalised: Tensor
    """(K, C): S1; its sum over the channels is dz."""
    plain: Tensor
    """(J, C): its sum over the channels is the gradient of the plain weights."""


def mixed_sum_gradient_sums(
    g: Tensor,
    ys: Sequence[Tensor],
    statistics: Statistics,
    xs: Sequence[Tensor] = (),
    *,
    launcher: Launcher | None = None,
) -> GradientSums:
    """The sums over g = dout that the gradients need; arguments as in `mixed_sum`."""
    launcher = launcher or load()
    check_maps("ys", ys, ys[0] if ys else None, launcher)
    check_maps("g", (g,), ys[0], launcher)
    check_maps("xs", xs, ys[0], launcher, beside=len(ys))
    check_statistics(statistics, ys)
    work = Positions.of((g, *ys, *xs), statistics.mean, statistics.inverse_deviation)
    tiles, counts = work.tiles(work.reduced), (len(ys), len(xs))
    partial = empty_floats(g, tiles, 1 + sum(counts), work.channels)
    fields = (
        *(addresses((*ys, *xs)), g.data_ptr()),
        *(statistics.mean.data_ptr(), statistics.inverse_deviation.data_ptr()),
        *(partial.data_ptr(), work.count, *counts, work.channels),
    )
    grid = (tiles, work.channel_tiles, 1)
    check_grid("gradient_sums", grid)
    instance = instances.gradient_sums(STORAGE[g.dtype], work.vector)
    launcher.launch(instance, grid, work.block, pack(SUMS_ARGUMENTS, fields), g.device)
    gradient, normalised, plain = sum_partials(partial, launcher).split((1, *counts))
    return GradientSums(gradient[0], normalised, plain)


def mixed_sum_grad(
    g: Tensor,
    ys: Sequence[Tensor],
    z: Tensor,
    statistics: Statistics,
    sums: GradientSums,
    plain_z: Tensor | None = None,
    count: int | None = None,
    *,
    dys: Sequence[Tensor] | None = None,
    launcher: Launcher | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients (dys, dxs) of the K normalised and J plain maps, given the sums.

    count: the positions that the statistics were taken over, N H W unless several ranks share
    them; dys: maps like ys to write to, otherwise new ones. There is one dx for each of the plain
    weights. Raises `ValueError`.
    """
    launcher = launcher or load()
    check_maps("ys", ys, ys[0] if ys else None, launcher)
    check_maps("g", (g,), ys[0], launcher)
    check_statistics(statistics, ys)
    channels = g.shape[1]
    check_dense("sums.gradient", sums.gradient, (channels,), torch.float32, g.device)
    shape = (len(ys), channels)
    check_dense("sums.normalised", sums.normalised, shape, torch.float32, g.device)
    plain = 0 if plain_z is None else len(plain_z)
    z, plain_z = checked_weights(z, plain_z, ys, plain)
    dys = [empty_map(tuple(g.shape), g) for _ in ys] if dys is None else list(dys)
    dxs = [empty_map(tuple(g.shape), g) for _ in range(plain)]
    check_maps("dys", dys, g, launcher)
    check_maps("dxs", dxs, g, launcher, beside=len(ys))
    if len(dys) != len(ys):
        raise ValueError(f"dys: {len(dys)} maps, need {len(ys)}")
    read = (statistics.mean, statistics.inverse_deviation, sums.gradient, sums.normalised)
    work = Positions.of((g, *ys, *dys, *dxs), *read)
    fields = (
        *(addresses(ys), addresses((*dys, *dxs)), g.data_ptr(), z.data_ptr(), plain_z.data_ptr()),
        *(one.data_ptr() for one in read),
        *(work.count, len(ys), plain, work.channels, 1 / (count or work.count)),
    )
    grid = (work.tiles(WRITTEN_POSITIONS), work.channel_tiles, 1)
    check_grid("mixed_sum_gradients", grid)
    instance = instances.mixed_sum_gradients(STORAGE[g.dtype], work.vector)
    launcher.launch(instance, grid, work.block, pack(GRADIENTS_ARGUMENTS, fields), g.device)
    return dys, dxs

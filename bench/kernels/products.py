"""What the scripts of kernels with matrix products share: tiles, statistics, their checks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.kernels.timing import gate
from lgcnet_fast.kernels.mixed_sum import Statistics
from lgcnet_fast.kernels.pointwise import ProductConfig


def stock_statistics(y: Tensor) -> tuple[Tensor, ...]:
    """Variance and mean a channel of (N, C, H, W), summed in float32, as a batch norm takes them.

    float64 stays as it is.
    """
    return torch.var_mean(y, (0, 2, 3), correction=0)


def gate_statistics(name: str, statistics: Statistics, maps: Tensor) -> None:
    """Those of the maps (B, N, C, H, W) as they are stored."""
    values = maps.double()
    gate(f"variance of {name}", statistics.variance, values.var((1, 3, 4), correction=0))
    centre = values.mean((1, 3, 4))
    # The mean may lie close to zero: compare it with the deviations.
    scale = values.std((1, 3, 4), correction=0)
    if not ((statistics.mean - centre).abs() <= 1e-5 * (scale + centre.abs())).all():
        raise SystemExit(f"WRONG RESULT: mean of {name}")


def tiles(default: ProductConfig) -> Iterator[ProductConfig]:
    """Tiles worth trying; the first is the default, whose output channels all of them have."""
    yield default
    for block_m, block_k, warps, stages in TILES:
        yield ProductConfig(block_m, default.block_n, block_k, warps, stages)


TILES = [
    *[(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3)],
    *[(128, 64, 8, 1), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (32, 64, 4, 2)],
]
"""Positions, steps of input channels, warps, stages."""

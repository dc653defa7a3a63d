"""Batch statistics from tiles: how those that kernels write of tiles merge.

A tile gives its mean and its M2 = sum (y - mean)^2 a channel, of the values as the map holds them,
rounded to its storage dtype; tiles merge by Chan's rule

    M2 = sum_t M2_t + sum_t n_t (mean_t - mean)^2

so that no sum of squares of a large mean is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator_dtype, check_dense
from lgcnet_fast.kernels.slabs import sums_of


@dataclass(frozen=True)
class Statistics:
    """Of K maps, each (K, C) in the accumulator dtype and contiguous."""

    mean: Tensor
    variance: Tensor
    """Biased, for the running statistics; the sums need only the other two."""
    inverse_deviation: Tensor
    """r = 1 / sqrt(variance + eps)."""


@triton.jit
def _tiles(partial, first, tiles, K, C, inside, BLOCK_T: tl.constexpr):
    """Mean and M2 of BLOCK_T tiles, (BLOCK_T, BLOCK_C) each; 0 beyond those that there are."""
    tile = first + tl.arange(0, BLOCK_T)[:, None]
    mask = (tile < tiles) & inside
    tile_ptr = partial + tile.to(tl.int64) * (2 * K * C)
    mean = tl.load(tile_ptr, mask=mask, other=0.0, cache_modifier=".cg")
    return mean, tl.load(tile_ptr + C, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def merge_tiles(
    partial_ptr, statistics_ptr, k, first_channel, M, tiles, tile_size, K, C,
    EPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """statistics[:, k] = (mean, variance, r) of BLOCK_C channels of map k of K, from its tiles.

    The sums are about the first tile's mean p, so that one pass is enough:

        mean = p + S / M,   M2 = sum_t M2_t + n_t (mean_t - p)^2 - S^2 / M,
        S = sum_t n_t (mean_t - p)

    Nothing cancels: as n_1 (p - mean)^2 <= M2, the two terms of M2 exceed it by no more than the
    number of tiles. EPS is a constant because numbers among the arguments of a launch are rounded
    to float32.
    """
    channel = first_channel + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < C
    lane = tl.arange(0, BLOCK_T)[:, None]
    ACC = partial_ptr.dtype.element_ty
    partial = partial_ptr + 2 * k * C + channel

    pivot = tl.load(partial, mask=inside, other=0.0, cache_modifier=".cg")
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=ACC)
    square = tl.zeros((BLOCK_T, BLOCK_C), dtype=ACC)
    whole = tile_size.to(ACC)
    rest = (M - (tiles - 1).to(tl.int64) * tile_size).to(ACC)
    following = _tiles(partial, 0, tiles, K, C, inside, BLOCK_T)
    for first in range(0, tiles, BLOCK_T):
        tile_mean, m2 = following
        # All of a round are on their way together: the compilers move loads to their use, where one
        # would wait for another, but none to another round.
        following = _tiles(partial, first + BLOCK_T, tiles, K, C, inside, BLOCK_T)
        tile = first + lane
        count = tl.where(tile == tiles - 1, rest, whole)
        distance = tl.where((tile < tiles) & inside, tile_mean - pivot, 0.0)
        total += count * distance
        square += m2 + count * distance * distance
    total, square = sums_of((total, square))
    shift = total / M.to(ACC)
    variance = square / M.to(ACC) - shift * shift
    # Rounding may take it below zero; NaN stays.
    variance = tl.where(variance < 0, 0.0, variance)
    target = statistics_ptr + k * C + channel
    tl.store(target, pivot + shift, mask=inside)
    tl.store(target + K * C, variance, mask=inside)
    tl.store(target + 2 * K * C, 1.0 / tl.sqrt(variance + EPS), mask=inside)


def check_positions(name: str, feature_map: Tensor, positions: int) -> None:
    """Raises `ValueError` for a single value a channel, which has no variance."""
    if positions < 2:
        shape = tuple(feature_map.shape)
        raise ValueError(f"{name}: one value a channel from shape {shape}, need more")


def empty_partial(maps: int, channels: int, positions: int, block_m: int, like: Tensor) -> Tensor:
    """For mean and M2 of tiles: (tiles, maps, 2, channels) in the accumulator's dtype."""
    tiles = triton.cdiv(positions, block_m)
    return like.new_empty(tiles, maps, 2, channels, dtype=accumulator_dtype(like.dtype))


def checked_statistics(out: Tensor | None, partial: Tensor) -> Tensor:
    """`out` or a new one: (3, K, C), contiguous, of the dtype of partial; raises `ValueError`."""
    _, maps, _, channels = partial.shape
    if out is None:
        return partial.new_empty(3, maps, channels)
    check_dense("out", out, (3, maps, channels), partial)
    if out.dtype != partial.dtype:
        raise ValueError(f"out: dtype {out.dtype}, need {partial.dtype}")
    return out

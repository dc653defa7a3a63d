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
from lgcnet_fast.kernels.slabs import MOST_SLABS


@dataclass(frozen=True)
class Statistics:
    """Of K maps, each (K, C) in the accumulator dtype and contiguous."""

    mean: Tensor
    variance: Tensor
    """Biased, for the running statistics; the sums need only the other two."""
    inverse_deviation: Tensor
    """r = 1 / sqrt(variance + eps)."""


@triton.jit(do_not_specialize=["M", "tiles", "K"])
def _merge_statistics_kernel(
    partial_ptr, mean_ptr, variance_ptr, r_ptr, M, tiles, tile_size, K, C,
    EPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean, variance and r (K, C) from the tiles' mean and M2; one program for BLOCK_C channels.

    The sums are about the first tile's mean p, so that one pass is enough:

        mean = p + S / M,   M2 = sum_t M2_t + n_t (mean_t - p)^2 - S^2 / M,
        S = sum_t n_t (mean_t - p)

    Nothing cancels: as n_1 (p - mean)^2 <= M2, the two terms of M2 exceed it by no more than the
    number of tiles. EPS is a constant because numbers among the arguments of a launch are rounded
    to float32.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < C
    k = tl.program_id(0) // channel_blocks
    lane = tl.arange(0, BLOCK_T)[:, None]
    ACC = partial_ptr.dtype.element_ty
    partial = partial_ptr + 2 * k * C + channel

    pivot = tl.load(partial, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=ACC)
    square = tl.zeros((BLOCK_T, BLOCK_C), dtype=ACC)
    for first in range(0, tiles, BLOCK_T):
        tile = (first + lane).to(tl.int64)
        mask = (tile < tiles) & inside
        tile_mean = tl.load(partial + tile * (2 * K * C), mask=mask, other=0.0)
        m2 = tl.load(partial + tile * (2 * K * C) + C, mask=mask, other=0.0)
        count = tl.minimum(M - tile * tile_size, tile_size).to(ACC)
        distance = tl.where(mask, tile_mean - pivot, 0.0)
        total += count * distance
        square += m2 + count * distance * distance
    shift = tl.sum(total, axis=0)[None, :] / M.to(ACC)
    variance = tl.sum(square, axis=0)[None, :] / M.to(ACC) - shift * shift
    # Rounding may take it below zero; NaN stays.
    variance = tl.where(variance < 0, 0.0, variance)
    tl.store(mean_ptr + k * C + channel, pivot + shift, mask=inside)
    tl.store(variance_ptr + k * C + channel, variance, mask=inside)
    tl.store(r_ptr + k * C + channel, 1.0 / tl.sqrt(variance + EPS), mask=inside)


def check_positions(name: str, feature_map: Tensor, positions: int) -> None:
    """Raises `ValueError` for a single value a channel, which has no variance."""
    if positions < 2:
        shape = tuple(feature_map.shape)
        raise ValueError(f"{name}: one value a channel from shape {shape}, need more")


def empty_partial(maps: int, channels: int, positions: int, block_m: int, like: Tensor) -> Tensor:
    """For mean and M2 of tiles: (tiles, maps, 2, channels) in the accumulator's dtype."""
    tiles = triton.cdiv(positions, block_m)
    return like.new_empty(tiles, maps, 2, channels, dtype=accumulator_dtype(like.dtype))


def merge_statistics(
    partial: Tensor, positions: int, block_m: int, eps: float, out: Tensor | None = None
) -> Statistics:
    """Statistics of K maps of `positions` values a channel from `partial`: (tiles, K, 2, C).

    partial: mean and M2 of tiles of `block_m` positions, the last one of what is left; out:
    (3, K, C), contiguous, of partial's dtype, to hold the mean, variance and inverse deviation.
    Raises `ValueError`.
    """
    tiles, maps, _, channels = partial.shape
    if out is None:
        out = partial.new_empty(3, maps, channels)
    check_dense("out", out, (3, maps, channels), partial)
    if out.dtype != partial.dtype:
        raise ValueError(f"out: dtype {out.dtype}, need {partial.dtype}")
    statistics = Statistics(*out.unbind())
    # As in `sum_rows`: 8 columns of float32 fill one memory transaction.
    block_t, block_c = min(MOST_SLABS, triton.next_power_of_2(tiles)), 8
    _merge_statistics_kernel[(maps * triton.cdiv(channels, block_c),)](
        partial, statistics.mean, statistics.variance, statistics.inverse_deviation,
        positions, tiles, block_m, maps, channels, EPS=eps, BLOCK_T=block_t, BLOCK_C=block_c,
        num_warps=8 if block_t > 128 else 4,
    )  # fmt: skip
    return statistics

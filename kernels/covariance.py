"""Mean and covariance of the channels of maps.

For each of K maps d_k over the M = N H W positions m,

    mean_k = sum_m d_k[m] / M,   V_k = sum_m (d_k[m] - mean_k) (d_k[m] - mean_k)^T / M

from which follow mean and variance of any pointwise product of the map (`product_algebra.py`). A
program takes a share of the positions of a map and a pair of blocks of channels. With e = d - p,
where the pivot p is zero or near the mean, it sums e and e e^T and gives its mean and its

    M2 = sum e e^T - (sum e) (sum e)^T / n

and shares merge by Chan's rule (see tile_statistics.py, of which this is the matrix form), in a
second launch, as what there is to merge, C + C^2 values a share, is much for a single program.

Matrix units of sm_90 cut off what a float32 sum cannot hold but for two bits: adding 16 products
takes two units of its last place from a sum of squares, n of them up to n 2^-27 of it. So shares
are no longer than 2^15 positions, which bounds that at 2^-12.

Matrix units take e in the storage dtype. Products of 16-bit values are exact there. p is zero for a
channel whose mean is within four deviations of zero, which costs one digit, and then e = d;
elsewhere d is within a factor of two of p and the difference has no more digits than d. So e is
exact but for rare outliers. Where p is zero for all channels of a program, the usual case, matrix
units read the values from where the copies to shared memory have put them.

Least traffic: K maps. Arithmetic: K M C^2 multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, accumulator_dtype, operand
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.product_sum import block_of, check_products
from lgcnet_fast.kernels.slabs import pointer_of

TILES = 4
"""The fewest of a share, where a map has so many: a share writes about as much as a tile reads."""
LONGEST = 2**15
"""Positions of a share, whole tiles."""
ROWS = 4
"""Of a matrix, that a program merges."""
SHARES_AT_ONCE = 64
"""At most: their loads are all under way together, and more programs are of no use."""
MERGED = 16384
"""Values at once: so many shares of so many rows."""


@dataclass(frozen=True)
class CovarianceConfig:
    """Tile: `block_m` positions by `block_c` channels, `stages` of them in flight; about `programs`
    in all for each pair of blocks of channels."""

    block_m: int
    block_c: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def default(cls, channels: int, dtype: torch.dtype) -> CovarianceConfig:
        """As many programs as an H200 holds at once, fewer of whole blocks of channels, which load
        faster: each writes a share of C^2. Small tiles for 32-bit products, which hold their
        operands in registers."""
        if dtype.itemsize > 2:
            return cls(16, min(64, block_of(channels)), 8, 1, 264)
        if channels <= 32:
            return cls(128, block_of(channels), 2, 3, 512)
        if channels < 64:
            return cls(128, 64, 4, 3, 264)
        if channels == 64:
            return cls(128, 64, 4, 4, 132)
        if channels <= 128:
            return cls(64, 128, 8, 3, 132)
        return cls(64, 64, 4, 4, 132)

    def share(self, maps: int, positions: int) -> int:
        """Positions of a program, whole tiles."""
        tiles = triton.cdiv(positions, self.block_m)
        shares = max(1, min(self.programs // maps, tiles // TILES))
        shares = max(shares, triton.cdiv(positions, LONGEST))
        return triton.cdiv(tiles, shares) * self.block_m


@triton.jit
def _pivot(start, count, channel, C, ACC: tl.constexpr, BLOCK_M: tl.constexpr):
    """(1, channels): near the mean of the first positions, where that is far from zero."""
    lane = tl.arange(0, BLOCK_M)[:, None]
    mask = (lane < count) & (channel < C)
    value = tl.load(start + (lane * C + channel), mask=mask, other=0.0).to(ACC)
    scale = 1 / tl.minimum(count, BLOCK_M).to(ACC)
    mean = tl.sum(value, axis=0, keep_dims=True) * scale
    square = tl.sum(value * value, axis=0, keep_dims=True) * scale
    far = 17 * mean * mean > 16 * square
    return tl.where(far, mean, 0.0).to(start.dtype.element_ty).to(ACC)


@triton.jit
def _distances(start, left, lane, channel, pivot, C, ACC: tl.constexpr, MASKED: tl.constexpr):
    """d - p of a tile; where MASKED, zero past the positions that are left and the channels."""
    place = start + (lane * C + channel)
    if MASKED:
        mask = (lane < left) & (channel < C)
        distance = tl.where(mask, tl.load(place, mask=mask, other=0.0).to(ACC) - pivot, 0.0)
    else:
        distance = tl.load(place).to(ACC) - pivot
    return distance


@triton.jit
def _add_tile(
    start, left, lane, row, row_pivot, column, pivot, row_total, total, product, C,
    ACC: tl.constexpr, OPERAND: tl.constexpr, BLOCKS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The three sums with a tile added; with a single block, whose rows are its columns, two."""
    storage = start.dtype.element_ty
    distance = _distances(start, left, lane, column, pivot, C, ACC, MASKED)
    total += distance
    e = distance.to(storage).to(OPERAND)
    rows = e
    if BLOCKS > 1:
        distance = _distances(start, left, lane, row, row_pivot, C, ACC, MASKED)
        row_total += distance
        rows = distance.to(storage).to(OPERAND)
    product = tl.dot(tl.trans(rows), e, product, input_precision="ieee", out_dtype=ACC)
    return row_total, total, product


@triton.jit
def _add_values(
    place, inside, total, product,
    ACC: tl.constexpr, OPERAND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """As `_add_tile` of whole tiles where p = 0: matrix units take the tile as it was loaded."""
    if MASKED:
        d = tl.load(place, mask=inside, other=0.0)
    else:
        d = tl.load(place)
    total += d.to(ACC)
    e = d.to(OPERAND)
    product = tl.dot(tl.trans(e), e, product, input_precision="ieee", out_dtype=ACC)
    return total, product


@kernel(do_not_specialize=["M", "share"])
def _shares_kernel(
    d_ptrs, partial_ptr, M, share, C,
    K: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS_MASKED: tl.constexpr,
):  # fmt: skip
    """partial[s, k] = (mean, M2) of share s of the positions: (1 + C, C).

    A program has one of the pairs of BLOCKS blocks of channels, of (i, j) and (j, i) that with
    i <= j, which is the only one to be written. Maps and pairs of the same positions are neighbours
    in launch order. CHANNELS_MASKED: the blocks are more than C channels.
    """
    wait_for_predecessor()
    pairs: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    pair = tl.program_id(0) % pairs
    k = tl.program_id(0) // pairs % K
    number = (tl.program_id(0) // pairs // K).to(tl.int64)
    row_block, beyond = 0, pair
    for block in tl.static_range(BLOCKS - 1):
        further = (row_block == block) & (beyond >= BLOCKS - block)
        beyond = tl.where(further, beyond - (BLOCKS - block), beyond)
        row_block = tl.where(further, row_block + 1, row_block)
    lanes = tl.arange(0, BLOCK_C)[None, :]
    row = row_block * BLOCK_C + lanes
    column = (row_block + beyond) * BLOCK_C + lanes

    first = number * share
    count = tl.minimum(M - first, share).to(tl.int32)
    start = pointer_of(d_ptrs, k, K) + first * C
    pivot = _pivot(start, count, column, C, ACC, BLOCK_M)
    row_pivot = pivot
    if BLOCKS > 1:
        row_pivot = _pivot(start, count, row, C, ACC, BLOCK_M)
    lane = tl.arange(0, BLOCK_M)[:, None]
    # By the position in a tile: threads pass one another nothing until the end.
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    row_total = tl.zeros((BLOCK_M if BLOCKS > 1 else 1, BLOCK_C), dtype=ACC)
    product = tl.zeros((BLOCK_C, BLOCK_C), dtype=ACC)
    whole = count // BLOCK_M * BLOCK_M
    as_loaded = False
    if BLOCKS == 1:
        as_loaded = tl.max(tl.abs(pivot)) == 0
    if as_loaded:
        for begin in range(0, whole, BLOCK_M):
            total, product = _add_values(
                start + begin * C + (lane * C + column), column < C, total, product,
                ACC, OPERAND, CHANNELS_MASKED,
            )  # fmt: skip
    else:
        for begin in range(0, whole, BLOCK_M):
            row_total, total, product = _add_tile(
                start + begin * C, count - begin, lane, row, row_pivot, column, pivot,
                row_total, total, product, C, ACC, OPERAND, BLOCKS, CHANNELS_MASKED,
            )  # fmt: skip
    if whole < count:
        row_total, total, product = _add_tile(
            start + whole * C, count - whole, lane, row, row_pivot, column, pivot,
            row_total, total, product, C, ACC, OPERAND, BLOCKS, True,
        )  # fmt: skip

    if BLOCKS == 1:
        row_total = total
    mean = tl.sum(total, axis=0)[None, :] / count.to(ACC)
    product -= tl.sum(row_total, axis=0)[:, None] * mean
    i = row_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    partial = partial_ptr + (number * K + k) * (1 + C) * C + column
    tl.store(partial, pivot + mean, mask=(column < C) & (beyond == 0))
    tl.store(partial + (1 + i) * C, product, mask=(i < C) & (column < C))


@kernel(do_not_specialize=["M", "share", "shares"])
def _merge_kernel(
    partial_ptr, mean_ptr, covariance_ptr, M, share, shares, C,
    K: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the covariance of map k, and its mean; sums are about the first share's.

    As in `merge_tiles`, with a_s = mean_s - mean_1 and S = sum_s n_s a_s:

        mean = mean_1 + S / M,   M V = sum_s M2_s + n_s a_s a_s^T - S S^T / M

    Tiles are (shares, rows, columns); BLOCKS of BLOCK_C channels as in `_shares_kernel`.
    """
    wait_for_predecessor()
    k = tl.program_id(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]
    j = tl.arange(0, COLUMNS)[None, None, :]
    lane = tl.arange(0, BLOCK_S)[:, None, None]
    inside = (i < C) & (j < C)
    stored = i * C + j
    if BLOCKS > 1:
        # Of what is the same, (i, j) and (j, i), the one that there is.
        stored = tl.where(i // BLOCK_C > j // BLOCK_C, j * C + i, stored)
    ACC = partial_ptr.dtype.element_ty
    partial = partial_ptr + k * (1 + C) * C
    first_i = tl.load(partial + i, mask=i < C, other=0.0)
    first_j = tl.load(partial + j, mask=j < C, other=0.0)
    sum_i = tl.zeros((1, ROWS, 1), dtype=ACC)
    sum_j = tl.zeros((1, 1, COLUMNS), dtype=ACC)
    product = tl.zeros((1, ROWS, COLUMNS), dtype=ACC)
    for first in range(0, shares, BLOCK_S):
        number = (first + lane).to(tl.int64)
        within = number < shares
        mean = partial + number * (K * (1 + C) * C)
        m2 = tl.load(mean + C + stored, mask=within & inside, other=0.0)
        mean_i = tl.load(mean + i, mask=within & (i < C), other=0.0)
        mean_j = tl.load(mean + j, mask=within & (j < C), other=0.0)
        count = tl.minimum(M - number * share, share).to(ACC)
        count = tl.where(within, count, 0.0)
        a_i = tl.where(within, mean_i - first_i, 0.0)
        a_j = tl.where(within, mean_j - first_j, 0.0)
        sum_i += tl.sum(count * a_i, axis=0, keep_dims=True)
        sum_j += tl.sum(count * a_j, axis=0, keep_dims=True)
        # Apart: each in the order in which its threads have it.
        product += tl.sum(m2, axis=0, keep_dims=True)
        product += tl.sum(count * a_i * a_j, axis=0, keep_dims=True)
    shift_i = sum_i / M.to(ACC)
    shift_j = sum_j / M.to(ACC)
    covariance = product / M.to(ACC) - shift_i * shift_j
    # Rounding may take a variance below zero; NaN stays.
    covariance = tl.where((i == j) & (covariance < 0), 0.0, covariance)
    tl.store(covariance_ptr + k * C * C + i * C + j, covariance, mask=inside)
    mine = (j < C) & (tl.program_id(0) == 0)
    tl.store(mean_ptr + k * C + j, first_j + shift_j, mask=mine)


def covariance(
    ds: Sequence[Tensor], config: CovarianceConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Mean (K, C) and biased covariance (K, C, C) of K maps, accumulator dtype, contiguous.

    ds: (N, C, H, W), channels_last, of one shape and dtype, up to 256 channels. float64 is for the
    interpreter only. Raises `ValueError` naming the argument at fault.
    """
    images, channels, height, width = check_products("ds", ds)
    positions, maps, dtype = images * height * width, len(ds), ds[0].dtype
    config = config or CovarianceConfig.default(channels, dtype)
    blocks = triton.cdiv(channels, config.block_c)
    share = config.share(maps, positions)
    shares = triton.cdiv(positions, share)
    partial = ds[0].new_empty(shares, maps, 1 + channels, channels, dtype=accumulator_dtype(dtype))
    _shares_kernel[(shares * maps * (blocks * (blocks + 1) // 2),)](
        tuple(ds), partial, positions, share, channels,
        K=maps, ACC=accumulator(dtype), OPERAND=operand(dtype),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCKS=blocks,
        CHANNELS_MASKED=channels < blocks * config.block_c,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    mean = partial.new_empty(maps, channels)
    matrices = partial.new_empty(maps, channels, channels)
    columns = triton.next_power_of_2(channels)
    most = min(SHARES_AT_ONCE, MERGED // (ROWS * columns))
    block_s = min(most, triton.next_power_of_2(shares))
    _merge_kernel[(triton.cdiv(channels, ROWS), maps)](
        partial, mean, matrices, positions, share, shares, channels,
        K=maps, BLOCKS=blocks, BLOCK_C=config.block_c, BLOCK_S=block_s, ROWS=ROWS,
        COLUMNS=columns, num_warps=merging_warps(block_s, columns),
    )  # fmt: skip
    return mean, matrices


def merging_warps(block_s: int, columns: int) -> int:
    """So that a thread has 64 values of a tile."""
    return max(1, min(8, block_s * ROWS * columns // 2048))

"""The weighted sum of normalised branches that a node computes, forward.

For the branches y_k of all edges that end in a node, and the plain terms x_j (skips):

    out = sum_k z_k r_k (y_k - mean_k) + sum_j zp_j x_j,   r_k = 1 / sqrt(var_k + eps)

mean_k and var_k (biased) are per channel over the M = N H W positions. All maps are (N, C, H, W) in
channels_last memory. In the search batch norms have no affine part, and z holds one number a map.
In a derived network z_k is the gamma_k of a batch norm, one number a channel, its beta_k is added
and the plain terms count as they are:

    out = sum_k gamma_k r_k (y_k - mean_k) + beta_k + sum_j x_j

The statistics come in two stages of one launch, those of slabs of positions and their merger: see
slabs.py, tile_statistics.py and last_program.py.

Least traffic of K branches and J plain terms, in maps: K for the statistics (none where the
producers deliver them), K + J + 1 for the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_dense,
    check_like,
    check_map,
    empty_map,
)
from lgcnet_fast.kernels.last_program import finishes_last, take_counters
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.rows import vector_width
from lgcnet_fast.kernels.slabs import SlabConfig, load_tile, pointer_of, sums_of
from lgcnet_fast.kernels.tile_statistics import (
    Statistics,
    check_positions,
    checked_statistics,
    empty_partial,
    merge_tiles,
)

SMALL = 2**20
"""Elements of maps that need every program that there can be."""


@dataclass(frozen=True)
class TileConfig:
    """Of one program that writes maps: a thread takes `loads` vectors of 16 bytes of each.

    Those of `ahead` maps are on their way at once, the one that is added among them.
    """

    loads: int
    ahead: int
    warps: int

    @classmethod
    def streaming(cls, elements: int, gradients: bool = False) -> TileConfig:
        """For maps of so many elements: fewer bytes a thread where programs are few.

        Measured on an H200 for 1 to 18 maps. gradients: as many maps are written as read.
        """
        if elements < SMALL:
            return cls(1, ahead=4, warps=4)
        if gradients and not SMALL < elements <= 2 * SMALL:
            return cls(2, ahead=2, warps=4)
        return cls(4, ahead=2, warps=4)

    @staticmethod
    def reducing(channels: int, maps: int, gradients: bool = False) -> SlabConfig:
        """For kernels that add up this many maps, or their products with a gradient."""
        return SlabConfig.default(channels, maps, gradients)

    def launch(self, like: Tensor, count: int) -> tuple[int, dict[str, int]]:
        """Programs for `count` maps like this one, and what a kernel is told of them."""
        channels, lanes = like.shape[1], 32 * self.warps
        vector = vector_width(like.dtype, channels)
        groups = lanes * (16 // like.dtype.itemsize) // vector
        vectors, per_pixel = like.numel() // vector, channels // vector
        period = per_pixel // math.gcd(per_pixel, groups)
        programs = triton.cdiv(vectors, self.loads * period * groups) * period
        programs = min(programs, triton.cdiv(vectors, groups))  # the others have nothing to do
        arguments = {"vectors": vectors, "per_pixel": per_pixel, "period": period}
        tile = {"LOADS": self.loads, "GROUPS": groups, "VECTOR": vector}
        ahead = {"AHEAD": min(self.ahead, count), "num_warps": self.warps}
        return programs, arguments | tile | ahead


@triton.jit
def tile_of(
    vectors, per_pixel, period,
    LOADS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """This program's first element, its channels (GROUPS, VECTOR), and of each of LOADS runs the
    offsets from there, (GROUPS, VECTOR), and the mask (GROUPS, 1).

    A map is a run of vectors of VECTOR channels, `per_pixel` a pixel. A program takes GROUPS
    of them LOADS times, `period` times as far apart: `period` * GROUPS vectors are whole pixels, so
    that a thread has the same channels each time, whatever their number.
    """
    part, phase = tl.program_id(0) // period, tl.program_id(0) % period
    group = tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, VECTOR)[None, :]
    channel = (phase * GROUPS + group) % per_pixel * VECTOR + lane
    first = (part.to(tl.int64) * (LOADS * period) + phase) * GROUPS
    left = tl.minimum(vectors - first, LOADS * period * GROUPS).to(tl.int32)
    offsets = ()
    masks = ()
    for load in tl.static_range(LOADS):
        vector = load * period * GROUPS + group
        offsets = offsets + (vector * VECTOR + lane,)
        masks = masks + (vector < left,)
    return first * VECTOR, channel, offsets, masks


@triton.jit
def load_runs(map_ptr, first, offsets, masks):
    """The runs of a map, a tensor each."""
    runs = ()
    for load in tl.static_range(len(offsets)):
        runs = runs + (tl.load(map_ptr + first + offsets[load], mask=masks[load], other=0.0),)
    return runs


@triton.jit
def load_ahead(map_ptrs, first, AHEAD: tl.constexpr, offsets, masks):
    """The runs of the first AHEAD maps."""
    runs = ()
    for k in tl.static_range(AHEAD):
        runs = runs + load_runs(map_ptrs[k], first, offsets, masks)
    return runs


@kernel(do_not_specialize=["M", "slab"])
def _slab_statistics_kernel(
    y_ptrs, partial_ptr, statistics_ptr, counter_ptr, M, slab, C,
    K: tl.constexpr, ACC: tl.constexpr, EPS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, LOADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """partial[s, k] = (mean, M2) of the positions of slab s, per channel.

    They merge into statistics[:, k]. With p, the mean of four of the slab's n values, from the sums
    of d = y - p and of its square,

        mean = p + sum d / n,   M2 = sum d^2 - (sum d)^2 / n

    However large the mean, nothing cancels: p is typically half a deviation from it, and at worst
    the terms of M2 are n + 1 times M2. WHOLE: slabs are whole tiles.
    """
    wait_for_predecessor()
    channel_blocks = tl.cdiv(C, BLOCK_C)
    number, k = tl.program_id(0) // channel_blocks, tl.program_id(1)
    block = tl.program_id(0) % channel_blocks
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < C
    first = number.to(tl.int64) * slab
    count = tl.minimum(M - first, slab).to(tl.int32)
    y = pointer_of(y_ptrs, k, K) + first * C + channel
    following = load_tile(y, 0, count, C, inside, BLOCK_M, BLOCK_C, LOADS)
    few = ()
    for quarter in tl.static_range(4):
        few = few + (tl.load(y + count // 4 * quarter * C, mask=inside, other=0.0),)
    pivot = tl.zeros((1, BLOCK_C), dtype=ACC)
    # Always so, which the compiler does not know: it moves no load of the tile to behind a branch.
    if count > 0:
        pivot = (few[0].to(ACC) + few[1].to(ACC) + few[2].to(ACC) + few[3].to(ACC)) * 0.25
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    square = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    for start in range(0, count, BLOCK_M * LOADS):
        values = following
        # On its way while this tile is added up.
        second = start + BLOCK_M * LOADS
        following = load_tile(y, second, count, C, inside, BLOCK_M, BLOCK_C, LOADS)
        for load in tl.static_range(LOADS):
            distance = values[load].to(ACC) - pivot
            if not WHOLE:
                position = start + load * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
                distance = tl.where(position < count, distance, 0.0)
            total += distance
            square += distance * distance
    share = 1 / count.to(ACC)
    total, square = sums_of((total, square))
    partial = partial_ptr + (number.to(tl.int64) * K + k) * (2 * C) + channel
    tl.store(partial, pivot + total * share, mask=inside)
    # Rounding may take it below zero; NaN stays.
    m2 = square - total * total * share
    tl.store(partial + C, tl.where(m2 < 0, 0.0, m2), mask=inside)
    slabs = tl.num_programs(0) // channel_blocks
    if finishes_last(counter_ptr + k * channel_blocks + block, slabs):
        merge_tiles(
            partial_ptr, statistics_ptr, k, block * BLOCK_C, M, slabs, slab, K, C,
            EPS, BLOCK_S, BLOCK_C,
        )  # fmt: skip


@triton.jit
def weight_of(z_ptrs, k: tl.constexpr, channel, ACC: tl.constexpr, AFFINE: tl.constexpr):
    """z_k, of `channel` where AFFINE: z_ptrs holds K vectors (C,) there, and one (K,) elsewhere."""
    if AFFINE:
        z = tl.load(z_ptrs[k] + channel)
    else:
        z = tl.load(z_ptrs[0] + k)
    return z.to(ACC)


@triton.jit
def load_rows(pointers, k: tl.constexpr, C, channel):
    """Row k of each of some tables (K, C), at these channels."""
    rows = ()
    for i in tl.static_range(len(pointers)):
        rows = rows + (tl.load(pointers[i] + k * C + channel),)
    return rows


@triton.jit
def _add_map(
    totals, values, rows, map_ptrs, z_ptrs, plain_z_ptr, beta_ptrs, mean_ptr, r_ptr,
    first, channel, offsets, masks, C, k: tl.constexpr,
    K: tl.constexpr, J: tl.constexpr, ACC: tl.constexpr, AFFINE: tl.constexpr,
    AHEAD: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """The totals with map k added, which `values` begin with; the values and rows that follow.

    rows: mean and r of each of the AHEAD maps that there are values of.
    """
    scale, mean, beta = 1.0, 0.0, 0.0
    if k < K:
        mean = rows[0]
        scale = weight_of(z_ptrs, k, channel, ACC, AFFINE) * rows[1]
        if AFFINE:
            beta = tl.load(beta_ptrs[k] + channel).to(ACC)
    elif not AFFINE:
        scale = tl.load(plain_z_ptr + (k - K)).to(ACC)
    sums = ()
    for load in tl.static_range(LOADS):
        value = values[load].to(ACC)
        sums = sums + (totals[load] + (scale * (value - mean) + beta),)
    following = ()
    for load in tl.static_range(LOADS, AHEAD * LOADS):
        following = following + (values[load],)
    next_rows = ()
    for row in tl.static_range(2, 2 * AHEAD):
        next_rows = next_rows + (rows[row],)
    if k + AHEAD < K + J:
        following = following + load_runs(map_ptrs[k + AHEAD], first, offsets, masks)
    else:
        for load in tl.static_range(LOADS):  # as many, of which none is used
            following = following + (values[load],)
    if k + AHEAD < K:
        next_rows = next_rows + load_rows((mean_ptr, r_ptr), k + AHEAD, C, channel)
    else:
        next_rows = next_rows + (rows[0], rows[1])
    # No load may pass it: the compiler would move each to its use.
    tl.debug_barrier()
    return sums, following, next_rows


@kernel(do_not_specialize=["vectors"])
def _mixed_sum_kernel(
    map_ptrs, z_ptrs, plain_z_ptr, beta_ptrs, mean_ptr, r_ptr, out_ptr, vectors, per_pixel, period,
    K: tl.constexpr, J: tl.constexpr, ACC: tl.constexpr, AFFINE: tl.constexpr,
    AHEAD: tl.constexpr, LOADS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """out = sum_k z_k r_k (y_k - mean_k) + sum_j zp_j x_j, or its affine form, on one tile.

    The maps are y_1 to y_K, x_1 to x_J. Unrolled, as to choose one of so many pointers takes longer
    than to add its map.
    """
    wait_for_predecessor()
    first, channel, offsets, masks = tile_of(vectors, per_pixel, period, LOADS, GROUPS, VECTOR)
    C = per_pixel * VECTOR
    totals = (tl.zeros((GROUPS, VECTOR), dtype=ACC),) * LOADS
    values = load_ahead(map_ptrs, first, AHEAD, offsets, masks)
    rows = ()
    for k in tl.static_range(AHEAD):
        rows = rows + load_rows((mean_ptr, r_ptr), k if k < K else 0, C, channel)
    for k in tl.static_range(K + J):
        # Always so, which the compiler does not know: it moves no load to before a branch. Of
        # unbranched code it moves all there are, and the registers do not hold them.
        if vectors > k - (K + J):
            totals, values, rows = _add_map(
                totals, values, rows, map_ptrs, z_ptrs, plain_z_ptr, beta_ptrs, mean_ptr, r_ptr,
                first, channel, offsets, masks, C, k, K, J, ACC, AFFINE, AHEAD, LOADS,
            )  # fmt: skip
    for load in tl.static_range(LOADS):
        tl.store(out_ptr + first + offsets[load], totals[load], mask=masks[load])


def batch_statistics(
    ys: Sequence[Tensor],
    eps: float = 1e-5,
    config: SlabConfig | None = None,
    out: Tensor | None = None,
) -> Statistics:
    """Statistics of each map over its N H W positions.

    ys: K maps (N, C, H, W), channels_last, of one shape and dtype; out: (3, K, C), contiguous, to
    hold the mean, variance and inverse deviation. Raises `ValueError` for other arguments and for a
    single value a channel, which has no variance.
    """
    check_maps("ys", ys, ys[0] if ys else None)
    images, channels, height, width = ys[0].shape
    positions, count = images * height * width, len(ys)
    check_positions("ys", ys[0], positions)
    config = config or TileConfig.reducing(channels, count)
    block_m = config.rows(ys[0].dtype)
    channel_blocks, tile = triton.cdiv(channels, config.block_c), block_m * config.loads
    slab = config.slab(positions, channels, count * channel_blocks, tile)
    partial = empty_partial(count, channels, positions, slab, ys[0])
    out = checked_statistics(out, partial)
    _slab_statistics_kernel[(len(partial) * channel_blocks, count)](
        tuple(ys), partial, out, take_counters(count * channel_blocks, out.device), positions, slab,
        channels, K=count, ACC=accumulator(ys[0].dtype), EPS=eps, WHOLE=positions % tile == 0,
        BLOCK_M=block_m, LOADS=config.loads, BLOCK_C=config.block_c,
        BLOCK_S=config.shares(len(partial), 2 * config.block_c), num_warps=config.warps,
    )  # fmt: skip
    return Statistics(*out.unbind())


def mixed_sum(
    ys: Sequence[Tensor],
    z: Tensor,
    statistics: Statistics,
    xs: Sequence[Tensor] = (),
    plain_z: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """The weighted sum of K normalised and J plain maps; like ys[0].

    ys: K >= 1 maps (N, C, H, W), channels_last; z: (K,), contiguous; statistics: of the ys;
    xs: J plain maps like ys; plain_z: (J,), contiguous. Weights of any float dtype. Raises
    `ValueError` naming the argument at fault.
    """
    plain_z = check_weights(z, plain_z, ys, xs)
    return _sum(ys, (z,), plain_z, (), statistics, xs, config)


def affine_sum(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    statistics: Statistics,
    xs: Sequence[Tensor] = (),
    config: TileConfig | None = None,
) -> Tensor:
    """The sum of K normalised maps, scaled and shifted by the channel, and J plain ones.

    gammas, betas: K each, (C,), contiguous, of any float dtype; the rest as in `mixed_sum`.
    """
    check_channel_weights("gammas", gammas, ys)
    check_channel_weights("betas", betas, ys)
    return _sum(ys, gammas, None, betas, statistics, xs, config)


def _sum(
    ys: Sequence[Tensor],
    z: Sequence[Tensor],
    plain_z: Tensor | None,
    betas: Sequence[Tensor],
    statistics: Statistics,
    xs: Sequence[Tensor],
    config: TileConfig | None,
) -> Tensor:
    """z: all weights in one, or one of each channel a map, with the betas."""
    check_maps("ys", ys, ys[0] if ys else None)
    check_maps("xs", xs, ys[0])
    check_statistics(statistics, ys)
    config = config or TileConfig.streaming(ys[0].numel())
    out = empty_map(tuple(ys[0].shape), ys[0])
    programs, tile = config.launch(out, len(ys) + len(xs))
    _mixed_sum_kernel[(programs,)](
        (*ys, *xs), tuple(z), plain_z, tuple(betas), statistics.mean,
        statistics.inverse_deviation, out, K=len(ys), J=len(xs), ACC=accumulator(ys[0].dtype),
        AFFINE=bool(betas), **tile,
    )  # fmt: skip
    return out


def check_maps(name: str, maps: Sequence[Tensor], like: Tensor | None) -> None:
    """Raises `ValueError` unless all are dense NHWC maps of the shape, dtype, device of `like`."""
    if like is None:
        raise ValueError(f"{name}: need at least one map")
    for index, feature_map in enumerate(maps):
        check_map(f"{name}[{index}]", feature_map)
        check_like(f"{name}[{index}]", feature_map, tuple(like.shape), like)
        if feature_map.dtype != like.dtype:
            raise ValueError(f"{name}[{index}]: dtype {feature_map.dtype}, need {like.dtype}")


def check_weights(
    z: Tensor, plain_z: Tensor | None, ys: Sequence[Tensor], xs: Sequence[Tensor]
) -> Tensor:
    """The weights of the plain terms, of which there may be none; raises `ValueError`."""
    check_dense("z", z, (len(ys),), ys[0])
    if plain_z is None:
        plain_z = z.new_empty(0)
    check_dense("plain_z", plain_z, (len(xs),), ys[0])
    return plain_z


def check_channel_weights(name: str, weights: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """Raises `ValueError` unless there is a contiguous one, (C,), for each of the maps."""
    if len(weights) != len(ys):
        raise ValueError(f"{name}: {len(weights)} for {len(ys)} maps")
    for index, weight in enumerate(weights):
        check_dense(f"{name}[{index}]", weight, (ys[0].shape[1],), ys[0])


def check_statistics(statistics: Statistics, ys: Sequence[Tensor]) -> None:
    """Raises `ValueError` unless mean and inverse deviation are (K, C), accumulator dtype."""
    shape, acc = (len(ys), ys[0].shape[1]), accumulator_dtype(ys[0].dtype)
    for name in ("mean", "inverse_deviation"):
        statistic = getattr(statistics, name)
        check_dense(f"statistics.{name}", statistic, shape, ys[0])
        if statistic.dtype != acc:
            raise ValueError(f"statistics.{name}: dtype {statistic.dtype}, need {acc}")

"""Gradients of the mixed sum, through the batch statistics.

With g = dout, yhat_k = r_k (y_k - mean_k), r_k = 1 / sqrt(var_k + eps), M positions, and per
channel

    S0 = sum g,   S1_k = sum g yhat_k,   P_j = sum g x_j

the gradients are

    dy_k = z_k r_k (g - S0 / M - yhat_k S1_k / M)
    dz_k = sum_c S1_k,   dx_j = zp_j g,   dzp_j = sum_c P_j

and with a batch norm's gamma_k in place of z_k, and its beta_k,

    dgamma_k = S1_k,   dbeta_k = S0,   dx_j = g

One pass reduces g against every map, in two stages of one launch; a second pass writes all dy_k:
an affine in (g, y_k) per channel. Under synchronised batch norm the sums of the ranks are added in
between.

Least traffic of K branches and J plain terms, in maps: K + J + 1 for the sums, 2 K + J + 1 for
the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_dense,
    empty_map,
)
from lgcnet_fast.kernels.last_program import finishes_last, take_counters
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import (
    Statistics,
    TileConfig,
    check_channel_weights,
    check_maps,
    check_statistics,
    check_weights,
    load_ahead,
    load_runs,
    tile_of,
    weight_of,
)
from lgcnet_fast.kernels.slabs import SlabConfig, load_tile, pointer_of, sums_of


@dataclass(frozen=True)
class GradientSums:
    """Sums over all positions, accumulator dtype: of g, g yhat_k and g x_j, per channel."""

    gradient: Tensor
    """(C,): S0."""
    normalised: Tensor
    """(K, C): S1."""
    plain: Tensor
    """(J, C): P."""
    weights: Tensor | None = None
    """(K + J,): of S1 and P over the channels, dz and dzp; where they were asked for."""

    @classmethod
    def of(cls, rows: Tensor, branches: int, weights: Tensor | None = None) -> GradientSums:
        """rows: what `gradient_sum_rows` gives."""
        return cls(rows[0], rows[1 : 1 + branches], rows[1 + branches :], weights)


@triton.jit
def _tiles_of(
    g_ptr, map_ptrs, first, count, C, inside, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
):  # fmt: skip
    """A tile of g and of each of the maps, one after the other."""
    values = load_tile(g_ptr, first, count, C, inside, BLOCK_M, BLOCK_C, LOADS)
    for i in tl.static_range(len(map_ptrs)):
        values = values + load_tile(map_ptrs[i], first, count, C, inside, BLOCK_M, BLOCK_C, LOADS)
    return values


@kernel(do_not_specialize=["M", "slab"])
def _gradient_sums_kernel(
    g_ptr, map_ptrs, mean_ptr, r_ptr, partial_ptr, sums_ptr, dz_ptr, counter_ptr, M, slab, C,
    K: tl.constexpr, J: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, LOADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """partial[s] = S0, S1_1 / r_1 to S1_K / r_K, P_1 to P_J of slab s of positions, per channel.

    sums are their sums over s, times r_k. One program adds up the shares of SUMMED channels, which
    are a block of BLOCK_C or all; where all, also dz, the sums over the channels but for that of
    S0. The maps are y_1 to y_K, x_1 to x_J; a program takes MAPS of them, for one reading of g.
    """
    wait_for_predecessor()
    groups: tl.constexpr = (K + J + MAPS - 1) // MAPS
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    number = tl.program_id(1).to(tl.int64)
    first = number * slab
    count = tl.minimum(M - first, slab).to(tl.int32)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < C
    start_of_g = g_ptr + first * C + channel
    starts = ()
    means = ()
    totals = ()
    for i in tl.static_range(MAPS):
        # Where maps are no multiple of MAPS, the last group has one several times.
        k = tl.minimum(group * MAPS + i, K + J - 1)
        starts = starts + (pointer_of(map_ptrs, k, K + J) + first * C + channel,)
        # Those of the plain maps are 0.
        means = means + (tl.load(mean_ptr + k * C + channel, mask=inside & (k < K), other=0.0),)
        totals = totals + (tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC),)
    gradient = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    following = _tiles_of(start_of_g, starts, 0, count, C, inside, BLOCK_M, BLOCK_C, LOADS)
    for start in range(0, count, BLOCK_M * LOADS):
        values = following
        # On their way together while this tile is added up: left to itself, ptxas moves every load
        # of a tile to its use, one after the other, but none to another round.
        second = start + BLOCK_M * LOADS
        following = _tiles_of(
            start_of_g, starts, second, count, C, inside, BLOCK_M, BLOCK_C, LOADS
        )  # fmt: skip
        sums = ()
        for i in tl.static_range(MAPS):
            total = totals[i]
            for load in tl.static_range(LOADS):
                # Past the end both are zero.
                distance = values[(1 + i) * LOADS + load].to(ACC) - means[i]
                total += values[load].to(ACC) * distance
            sums = sums + (total,)
        totals = sums
        for load in tl.static_range(LOADS):
            gradient += values[load].to(ACC)
    partial = partial_ptr + number * ((1 + K + J) * C) + channel
    if group == 0:
        tl.store(partial, tl.sum(gradient, axis=0)[None, :], mask=inside)
    rows = sums_of(totals)
    for i in tl.static_range(MAPS):
        k = group * MAPS + i
        tl.store(partial + (1 + k) * C, rows[i], mask=inside & (k < K + J))
    blocks: tl.constexpr = SUMMED // BLOCK_C
    together = tl.program_id(0) // (groups * blocks)
    programs = tl.num_programs(1) * tl.minimum(blocks, tl.num_programs(0) // groups)
    if finishes_last(counter_ptr + together * groups + group, programs):
        _sum_slabs(
            partial_ptr, r_ptr, sums_ptr, dz_ptr, group, together * SUMMED, tl.num_programs(1), C,
            K, K + J, MAPS, BLOCK_S, SUMMED,
        )  # fmt: skip


@triton.jit
def _shares(
    partial, group, first, slabs, C, inside,
    COUNT: tl.constexpr, MAPS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Rows of BLOCK_S slabs from `first` on: S0, of the first group only, and those of a group."""
    number = first + tl.arange(0, BLOCK_S)[:, None]
    present = (number < slabs) & inside
    share = partial + number.to(tl.int64) * ((1 + COUNT) * C)
    mask = present & (group == 0)
    values = (tl.load(share, mask=mask, other=0.0, cache_modifier=".cg"),)
    for i in tl.static_range(MAPS):
        row = 1 + group * MAPS + i
        mask = present & (row <= COUNT)
        values = values + (tl.load(share + row * C, mask=mask, other=0.0, cache_modifier=".cg"),)
    return values


@triton.jit
def _sum_slabs(
    partial_ptr, r_ptr, sums_ptr, dz_ptr, group, first_channel, slabs, C,
    K: tl.constexpr, COUNT: tl.constexpr, MAPS: tl.constexpr, BLOCK_S: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """What a group of the COUNT maps has in sums and dz, the first group also S0."""
    ACC = partial_ptr.dtype.element_ty
    channel = first_channel + tl.arange(0, SUMMED)[None, :]
    inside = channel < C
    factors = ()
    for i in tl.static_range(MAPS):
        k = group * MAPS + i
        factors = factors + (tl.load(r_ptr + k * C + channel, mask=inside & (k < K), other=1.0),)
    totals = (tl.zeros((BLOCK_S, SUMMED), dtype=ACC),) * (1 + MAPS)
    following = _shares(
        partial_ptr + channel, group, 0, slabs, C, inside, COUNT, MAPS, BLOCK_S
    )  # fmt: skip
    for first in range(0, slabs, BLOCK_S):
        values = following
        # As in the kernel: the compilers move loads to their use, where one would wait for another,
        # but none to another round.
        following = _shares(
            partial_ptr + channel, group, first + BLOCK_S, slabs, C, inside, COUNT, MAPS, BLOCK_S
        )  # fmt: skip
        sums = ()
        for i in tl.static_range(1 + MAPS):
            sums = sums + (totals[i] + values[i],)
        totals = sums
    rows = sums_of(totals)
    tl.store(sums_ptr + channel, rows[0], mask=inside & (group == 0))
    for i in tl.static_range(MAPS):
        k = group * MAPS + i
        total = rows[1 + i] * factors[i]
        tl.store(sums_ptr + (1 + k) * C + channel, total, mask=inside & (k < COUNT))
        tl.store(dz_ptr + k, tl.sum(total), mask=(k < COUNT) & (SUMMED >= C))


@kernel(do_not_specialize=["vectors", "count"])
def _mixed_sum_grad_kernel(
    g_ptr, y_ptrs, dy_ptrs, dx_ptrs, z_ptrs, plain_z_ptr, mean_ptr, r_ptr, s0_ptr, s1_ptr, count,
    vectors, per_pixel, period,
    K: tl.constexpr, J: tl.constexpr, ACC: tl.constexpr, AFFINE: tl.constexpr,
    AHEAD: tl.constexpr, LOADS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dy_k = z_k r_k ((g - S0 / M) - (r_k S1_k / M) (y_k - mean_k)), dx_j = zp_j g on one tile."""
    wait_for_predecessor()
    first, channel, offsets, masks = tile_of(vectors, per_pixel, period, LOADS, GROUPS, VECTOR)
    C = per_pixel * VECTOR
    values = load_ahead(y_ptrs, first, AHEAD, offsets, masks)
    share = 1.0 / count.to(ACC)
    shift = tl.load(s0_ptr + channel) * share
    gs = ()
    for load in tl.static_range(LOADS):
        g = tl.load(g_ptr + first + offsets[load], mask=masks[load], other=0.0).to(ACC)
        for j in tl.static_range(J):
            dx = tl.load(plain_z_ptr + j).to(ACC) * g
            tl.store(dx_ptrs[j] + first + offsets[load], dx, mask=masks[load])
        gs = gs + (g - shift,)
    for k in tl.static_range(K):
        # On its way before anything is stored, which loads would wait for.
        if k + AHEAD < K:
            values = values + load_runs(y_ptrs[k + AHEAD], first, offsets, masks)
        mean = tl.load(mean_ptr + k * C + channel)
        r = tl.load(r_ptr + k * C + channel)
        s1 = tl.load(s1_ptr + k * C + channel)
        scale = weight_of(z_ptrs, k, channel, ACC, AFFINE) * r
        slope = r * s1 * share
        for load in tl.static_range(LOADS):
            y = values[k * LOADS + load].to(ACC)
            value = scale * (gs[load] - slope * (y - mean))
            tl.store(dy_ptrs[k] + first + offsets[load], value, mask=masks[load])


def mixed_sum_gradient_sums(
    g: Tensor,
    ys: Sequence[Tensor],
    statistics: Statistics,
    xs: Sequence[Tensor] = (),
    config: SlabConfig | None = None,
    weights: Tensor | None = None,
) -> GradientSums:
    """The sums over g = dout that the gradients need; other arguments as in `mixed_sum`.

    weights: (K + J,), in the accumulator's dtype, for those that the weights need, if they do.
    """
    return GradientSums.of(_sums(g, ys, statistics, xs, config, weights), len(ys), weights)


def gradient_sum_rows(
    g: Tensor,
    ys: Sequence[Tensor],
    statistics: Statistics,
    xs: Sequence[Tensor] = (),
    config: SlabConfig | None = None,
) -> Tensor:
    """The rows S0, S1_1 to S1_K, P_1 to P_J: (1 + K + J, C); arguments as in `mixed_sum`."""
    return _sums(g, ys, statistics, xs, config, None)


def _sums(
    g: Tensor,
    ys: Sequence[Tensor],
    statistics: Statistics,
    xs: Sequence[Tensor],
    config: SlabConfig | None,
    weights: Tensor | None,
) -> Tensor:
    """The rows; weights: for their sums over the channels but for the first row's, if wanted."""
    check_maps("ys", ys, ys[0] if ys else None)
    check_maps("g", (g,), ys[0])
    check_maps("xs", xs, ys[0])
    check_statistics(statistics, ys)
    channels = g.shape[1]
    positions, count = g.numel() // channels, len(ys) + len(xs)
    config = config or TileConfig.reducing(channels, count, gradients=True)
    together = min(config.maps, count)
    block_m, block_c = config.rows(g.dtype), config.block_c
    channel_blocks = triton.cdiv(channels, block_c)
    shares = triton.cdiv(count, together) * channel_blocks
    slab = config.slab(positions, channels, shares, block_m * config.loads)
    slabs = triton.cdiv(positions, slab)
    summed = block_c if weights is None else max(block_c, triton.next_power_of_2(channels))
    partial = g.new_empty(slabs, 1 + count, channels, dtype=accumulator_dtype(g.dtype))
    rows = partial.new_empty(1 + count, channels)
    if weights is None:
        weights = partial.new_empty(count)  # The kernel writes them anyway if they cost nothing.
    check_dense("weights", weights, (count,), g)
    if weights.dtype != partial.dtype:
        raise ValueError(f"weights: dtype {weights.dtype}, need {partial.dtype}")
    _gradient_sums_kernel[(shares, slabs)](
        g, (*ys, *xs), statistics.mean, statistics.inverse_deviation, partial, rows,
        weights, take_counters(shares, g.device), positions, slab, channels, K=len(ys), J=len(xs),
        MAPS=together, ACC=accumulator(g.dtype), BLOCK_M=block_m, LOADS=config.loads,
        BLOCK_C=block_c, BLOCK_S=config.shares(slabs, (1 + together) * summed), SUMMED=summed,
        num_warps=config.warps,
    )  # fmt: skip
    return rows


def mixed_sum_grad(
    g: Tensor,
    ys: Sequence[Tensor],
    z: Tensor,
    statistics: Statistics,
    sums: GradientSums,
    plain_z: Tensor | None = None,
    count: int | None = None,
    config: TileConfig | None = None,
    dys: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients (dys, dxs) of the K normalised and J plain maps, given the sums.

    count: the positions that the statistics were taken over, N H W unless several ranks share
    them; dys: maps like ys to write to, otherwise new ones. There is one dx for each of the plain
    weights. Raises `ValueError`.
    """
    dxs = [empty_map(tuple(g.shape), g) for _ in range(0 if plain_z is None else len(plain_z))]
    plain_z = check_weights(z, plain_z, ys, dxs)
    return _gradients(g, ys, (z,), False, statistics, sums, plain_z, dxs, count, config, dys), dxs


def affine_sum_grad(
    g: Tensor,
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    statistics: Statistics,
    sums: GradientSums,
    config: TileConfig | None = None,
    dys: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The gradients of the K normalised maps of `affine_sum`; that of a plain map is g.

    Arguments as there and in `mixed_sum_grad`. Raises `ValueError`.
    """
    check_channel_weights("gammas", gammas, ys)
    return _gradients(g, ys, gammas, True, statistics, sums, None, (), None, config, dys)


def _gradients(
    g: Tensor,
    ys: Sequence[Tensor],
    z: Sequence[Tensor],
    affine: bool,
    statistics: Statistics,
    sums: GradientSums,
    plain_z: Tensor | None,
    dxs: Sequence[Tensor],
    count: int | None,
    config: TileConfig | None,
    dys: Sequence[Tensor] | None,
) -> list[Tensor]:
    """dys; writes dxs. z: all weights in one or, `affine`, one of each channel a map."""
    check_maps("ys", ys, ys[0] if ys else None)
    check_maps("g", (g,), ys[0])
    check_statistics(statistics, ys)
    channels = g.shape[1]
    check_dense("sums.gradient", sums.gradient, (channels,), g)
    check_dense("sums.normalised", sums.normalised, (len(ys), channels), g)
    dys = [empty_map(tuple(g.shape), g) for _ in ys] if dys is None else list(dys)
    check_maps("dys", dys, g)
    if len(dys) != len(ys):
        raise ValueError(f"dys: {len(dys)} maps, need {len(ys)}")
    config = config or TileConfig.streaming(g.numel(), gradients=True)
    programs, tile = config.launch(g, len(ys))
    _mixed_sum_grad_kernel[(programs,)](
        g, tuple(ys), tuple(dys), tuple(dxs), tuple(z), plain_z, statistics.mean,
        statistics.inverse_deviation, sums.gradient, sums.normalised,
        count or g.numel() // channels, K=len(ys), J=len(dxs), ACC=accumulator(g.dtype),
        AFFINE=affine, **tile,
    )  # fmt: skip
    return dys

"""Gradients of a node as products of its maps: see product_sum.py and product_algebra.py.

With g = dout, for K maps d_k over the M = N H W positions m,

    S0 = sum_m g[m],   T_k = sum_m g[m] d_k[m]^T

of which `product_algebra.py` makes the coefficients of

    dd_k[m] = A_k g[m] + B_k d_k[m] + c_k

The sums come in two stages: every program sums its tiles, `sum_rows` adds the shares in a fixed
order. dd_k may take the place of d_k, as a tile of it is read by one program only, before it writes
there.

Least traffic, in maps: K + 1 for the sums, 2 K + 1 for the gradients. Programs read g again for
each map, or `maps` of them, from the second-level cache: those of the same positions are
neighbours in launch order. Arithmetic: K M C C_out multiply-adds for the sums, K M C (C + C_out)
for the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_dense,
    empty_map,
    has_large_cores,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.product_sum import (
    block_of,
    check_gradient,
    check_products,
    check_sums,
)
from lgcnet_fast.kernels.slabs import pointer_of

CORES = 132
"""Of an H200."""
TILES = 4
"""The fewest tiles of a program that sums, where it has not all."""


def _programs(tiles: int, most: int) -> int:
    """The fewest, of up to `most`, that have no more tiles each."""
    return triton.cdiv(tiles, triton.cdiv(tiles, max(1, most)))


@dataclass(frozen=True)
class ProductSumsConfig:
    """Tile: `block_m` positions by `block_c` channels of `maps` maps, `stages` of them in flight;
    `programs` share the positions."""

    block_m: int
    block_c: int
    maps: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def default(
        cls, maps: int, positions: int, channels: int, out_channels: int, dtype: torch.dtype,
        large: bool = True,
    ) -> ProductSumsConfig:  # fmt: skip
        """As many programs as run at once, fewer where their shares would cost more; two maps to
        a program where both sums fit and g, which it reads for each, is worth it.

        large: see `has_large_cores`.
        """
        if dtype.itemsize > 2:
            block_m, block_c, together, warps, stages, resident = 16, 32, 1, 8, 1, 2
        elif max(channels, out_channels) <= 32:
            block_m, block_c, together, warps, stages, resident = 128, 32, 1, 4, 3, 6
        elif out_channels <= 64:
            block_m, block_c, together, warps, stages, resident = 64, 64, 2, 4, 3, 2
            together = 2 if large else 1
        elif not large:
            block_m, block_c, together, warps, stages, resident = 64, 64, 2, 8, 2, 1
        else:
            block_m, block_c, together, warps, stages, resident = 64, 64, 1, 4, 3, 2
        block_c, together = min(block_c, block_of(channels)), min(together, maps)
        parts = triton.cdiv(maps, together) * triton.cdiv(channels, block_c) + 1
        tiles = triton.cdiv(positions, block_m)
        most = min(resident * CORES // parts, triton.cdiv(tiles, TILES))
        return cls(block_m, block_c, together, warps, stages, _programs(tiles, most))


@dataclass(frozen=True)
class InputGradientsConfig:
    """Tile: `block_m` positions, `block_n` channels of a gradient at once, `stages` tiles in
    flight; `programs` share the positions of a map."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def default(
        cls, maps: int, positions: int, channels: int, out_channels: int, dtype: torch.dtype,
        large: bool = True,
    ) -> InputGradientsConfig:  # fmt: skip
        """As many programs as run at once, each with its matrices; large: see `has_large_cores`."""
        widest = max(channels, out_channels)
        if dtype.itemsize > 2:
            block_m, block_n, warps, stages, resident = 16, 32, 8, 1, 2
        elif widest <= 32:
            block_m, block_n, warps, stages, resident = 128, 32, 4, 3, 3
        elif widest <= 64:
            block_m, block_n, warps, stages, resident = 64, 64, 4, 3, 3
        elif widest <= 128 and large:
            block_m, block_n, warps, stages, resident = 64, 128, 4, 3, 1
        elif widest <= 128:
            block_m, block_n, warps, stages, resident = 32, 128, 8, 1, 2
        else:
            block_m, block_n, warps, stages, resident = 64, 32, 8, 1, 1
        block_n = min(block_n, block_of(channels))
        tiles = triton.cdiv(positions, block_m)
        return cls(block_m, block_n, warps, stages, _programs(tiles, resident * CORES // maps))


@triton.jit
def _present(lane, left, BLOCK_M: tl.constexpr):
    """Which lanes of a tile are positions, of which so many are left; compared in 32 bits."""
    return lane < tl.minimum(left, BLOCK_M).to(tl.int32)


@triton.jit
def _sum_gradient(
    g_ptr, s0_ptr, M, CO, number, programs,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S0 of every `programs`-th tile from `number` on."""
    lane = tl.arange(0, BLOCK_M)[:, None]
    o = tl.arange(0, BLOCK_O)[None, :]
    # By the position in a tile: threads pass one another nothing until the end.
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=ACC)
    for first in tl.range(number * BLOCK_M, M, programs * BLOCK_M, num_stages=STAGES):
        mask = _present(lane, M - first, BLOCK_M) & (o < CO)
        total += tl.load(g_ptr + first * CO + (lane * CO + o), mask=mask, other=0.0).to(ACC)
    tl.store(s0_ptr + o, tl.sum(total, axis=0, keep_dims=True), mask=o < CO)


@triton.jit
def _sum_products(
    g_ptr, d_ptrs, share, M, C, CO, group, block, number, programs,
    K: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """T of MAPS maps and BLOCK_C channels, of the same tiles."""
    lane = tl.arange(0, BLOCK_M)[:, None]
    o = tl.arange(0, BLOCK_O)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    d_starts = ()
    totals = ()
    for i in tl.static_range(MAPS):
        d_starts = d_starts + (pointer_of(d_ptrs, tl.minimum(group * MAPS + i, K - 1), K),)
        totals = totals + (tl.zeros((BLOCK_O, BLOCK_C), dtype=ACC),)
    for first in range(number * BLOCK_M, M, programs * BLOCK_M):
        within = _present(lane, M - first, BLOCK_M)
        g_start = g_ptr + first * CO + (lane * CO + o[None, :])
        g = tl.load(g_start, mask=within & (o < CO)[None, :], other=0.0).to(OPERAND)
        transposed = tl.trans(g)
        sums = ()
        for i in tl.static_range(MAPS):
            d_start = d_starts[i] + first * C + (lane * C + c)
            d = tl.load(d_start, mask=within & (c < C), other=0.0).to(OPERAND)
            total = tl.dot(transposed, d, totals[i], input_precision="ieee", out_dtype=ACC)
            sums = sums + (total,)
        totals = sums

    entry = o[:, None] * C + c
    inside = (o < CO)[:, None] & (c < C)
    for i in tl.static_range(MAPS):
        k = group * MAPS + i
        tl.store(share + k * CO * C + entry, totals[i], mask=inside & (k < K))


@kernel(do_not_specialize=["M", "programs"])
def _sums_kernel(
    g_ptr, d_ptrs, share_ptr, M, C, CO, programs,
    K: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """share[number] = T_1 to T_K, S0 of every `programs`-th tile; BLOCK_O >= CO.

    A program has BLOCK_C channels of MAPS maps, or S0.
    """
    wait_for_predecessor()
    blocks = tl.cdiv(C, BLOCK_C)
    parts = blocks * ((K + MAPS - 1) // MAPS) + 1
    part = tl.program_id(0) % parts
    # 64 bits, as are the offsets into maps that come of it.
    number = (tl.program_id(0) // parts).to(tl.int64)
    share = share_ptr + number * (K * CO * C + CO)
    if part == parts - 1:
        s0_ptr = share + K * CO * C
        _sum_gradient(g_ptr, s0_ptr, M, CO, number, programs, ACC, BLOCK_M, BLOCK_O, STAGES)
    else:
        _sum_products(
            g_ptr, d_ptrs, share, M, C, CO, part // blocks, part % blocks, number, programs,
            K, MAPS, ACC, OPERAND, BLOCK_M, BLOCK_C, BLOCK_O,
        )  # fmt: skip


@triton.jit
def _matrix(matrix_ptr, n, column, ROWS, COLUMNS, OPERAND: tl.constexpr):
    """Rows n (BLOCK_N, 1) of a matrix, with zeros beside it."""
    mask = (n < ROWS) & (column < COLUMNS)
    return tl.load(matrix_ptr + (n * COLUMNS + column), mask=mask, other=0.0).to(OPERAND)


@kernel(do_not_specialize=["M", "programs"])
def _input_gradients_kernel(
    g_ptr, d_ptrs, dd_ptrs, from_gradient_ptr, from_map_ptr, shift_ptr, M, C, CO, programs,
    K: tl.constexpr, FROM_MAP: tl.constexpr, SHIFTED: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dd_k = A_k g + B_k d_k + c_k on every `programs`-th tile of a map.

    BLOCKS of BLOCK_N >= C channels one after the other; BLOCK_C >= C, BLOCK_O >= CO. A single block
    keeps its matrices.
    """
    wait_for_predecessor()
    k = tl.program_id(0) % K
    program = (tl.program_id(0) // K).to(tl.int64)
    d_ptr = pointer_of(d_ptrs, k, K)
    dd_ptr = pointer_of(dd_ptrs, k, K)
    from_gradient_ptr += k * C * CO
    from_map_ptr += k * C * C
    shift_ptr += k * C
    lane = tl.arange(0, BLOCK_M)[:, None]
    o = tl.arange(0, BLOCK_O)[None, :]
    c = tl.arange(0, BLOCK_C)[None, :]
    lanes = tl.arange(0, BLOCK_N)
    if BLOCKS == 1:
        from_gradient = _matrix(from_gradient_ptr, lanes[:, None], o, C, CO, OPERAND)
        if FROM_MAP:
            from_map = _matrix(from_map_ptr, lanes[:, None], c, C, C, OPERAND)
    for first in range(program * BLOCK_M, M, programs * BLOCK_M):
        within = _present(lane, M - first, BLOCK_M)
        g_start = g_ptr + first * CO + (lane * CO + o)
        g = tl.load(g_start, mask=within & (o < CO), other=0.0).to(OPERAND)
        if FROM_MAP:
            d_start = d_ptr + first * C + (lane * C + c)
            d = tl.load(d_start, mask=within & (c < C), other=0.0).to(OPERAND)
        for block in tl.static_range(BLOCKS):
            n = block * BLOCK_N + lanes
            if BLOCKS > 1:
                from_gradient = _matrix(from_gradient_ptr, n[:, None], o, C, CO, OPERAND)
            dd = tl.dot(g, tl.trans(from_gradient), input_precision="ieee", out_dtype=ACC)
            if FROM_MAP:
                if BLOCKS > 1:
                    from_map = _matrix(from_map_ptr, n[:, None], c, C, C, OPERAND)
                dd = tl.dot(d, tl.trans(from_map), dd, input_precision="ieee", out_dtype=ACC)
            if SHIFTED:
                dd += tl.load(shift_ptr + n, mask=n < C, other=0.0)[None, :]
            dd_start = dd_ptr + first * C + (lane * C + n[None, :])
            tl.store(dd_start, dd.to(dd_ptr.dtype.element_ty), mask=within & (n < C)[None, :])


def product_sums(
    g: Tensor, ds: Sequence[Tensor], config: ProductSumsConfig | None = None
) -> tuple[Tensor, Tensor]:
    """T (K, C_out, C) and S0 (C_out,), accumulator dtype, contiguous; same bits on every run.

    g: (N, C_out, H, W); ds: K maps (N, C, H, W); all channels_last, of one dtype, up to 256
    channels. float64 is for the interpreter only. Raises `ValueError` naming the argument at fault.
    """
    maps, (_, channels, _, _) = len(ds), check_products("ds", ds)
    out_channels, dtype = check_gradient("g", g, ds), g.dtype
    positions = g.numel() // out_channels
    config = config or ProductSumsConfig.default(
        maps, positions, channels, out_channels, dtype, has_large_cores(g)
    )
    products = maps * out_channels * channels
    shares = g.new_empty(config.programs, products + out_channels, dtype=accumulator_dtype(dtype))
    groups = triton.cdiv(channels, config.block_c) * triton.cdiv(maps, config.maps)
    _sums_kernel[((groups + 1) * config.programs,)](
        g, tuple(ds), shares, positions, channels, out_channels, config.programs,
        K=maps, MAPS=config.maps, ACC=accumulator(dtype), OPERAND=operand(dtype),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_O=block_of(out_channels),
        STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    sums = _summed(shares)
    return sums[:products].view(maps, out_channels, channels), sums[products:]


def _summed(shares: Tensor) -> Tensor:
    """In tiles of up to 2048 values."""
    if len(shares) == 1:
        return shares[0]
    rows = min(256, triton.next_power_of_2(len(shares)))
    return sum_rows(shares, block_rows=rows, block_columns=min(128, 2048 // rows))


def product_input_gradients(
    g: Tensor,
    ds: Sequence[Tensor],
    from_gradient: Tensor,
    from_map: Tensor | None,
    shift: Tensor | None,
    outs: Sequence[Tensor] | None = None,
    config: InputGradientsConfig | None = None,
) -> list[Tensor]:
    """dd_k = from_gradient_k g + from_map_k d_k + shift_k: K maps like the ds.

    g, ds: as in `product_sums`; from_gradient: (K, C, C_out), from_map: (K, C, C), of their dtype;
    shift: (K, C), accumulator dtype; all contiguous; None stands for zero. outs: maps to write to,
    of which each may be its own d. Raises `ValueError` naming the argument at fault.
    """
    maps, (_, channels, _, _) = len(ds), check_products("ds", ds)
    out_channels, dtype = check_gradient("g", g, ds), g.dtype
    matrices = {"from_gradient": (from_gradient, out_channels), "from_map": (from_map, channels)}
    for name, (matrix, columns) in matrices.items():
        if matrix is not None:
            check_dense(name, matrix, (maps, channels, columns), g)
            if matrix.dtype != dtype:
                raise ValueError(f"{name}: dtype {matrix.dtype}, g has {dtype}")
    if shift is not None:
        check_sums("shift", shift, (maps, channels), g)
    outs = [empty_map(tuple(d.shape), d) for d in ds] if outs is None else list(outs)
    check_maps("outs", outs, ds[0])
    if len(outs) != maps:
        raise ValueError(f"outs: {len(outs)} maps, need {maps}")
    positions = g.numel() // out_channels
    config = config or InputGradientsConfig.default(
        maps, positions, channels, out_channels, dtype, has_large_cores(g)
    )
    _input_gradients_kernel[(maps * config.programs,)](
        g, tuple(ds), tuple(outs), from_gradient, from_gradient if from_map is None else from_map,
        from_gradient if shift is None else shift, positions, channels, out_channels,
        config.programs,
        K=maps, FROM_MAP=from_map is not None, SHIFTED=shift is not None,
        ACC=accumulator(dtype), OPERAND=operand(dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCKS=triton.cdiv(channels, config.block_n),
        BLOCK_C=block_of(channels), BLOCK_O=block_of(out_channels),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return outs

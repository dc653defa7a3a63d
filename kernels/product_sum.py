"""A node as products of its maps: the weighted sum of pointwise products, forward.

With matrices W_k, raw maps y_r, plain maps x_j and M = N H W positions m,

    out[m] = sum_k (W_k d_k[m] - b_k) + sum_r z_r r_r * (y_r[m] - mean_r) + sum_j z_j x_j[m]

W_k and b_k hold what normalises a product (`product_algebra.py`), so that the products themselves
are never written; r_r is the inverse deviation of a raw map. A program walks through all maps of a
tile of positions, raw and plain ones first.

Least traffic of K products, in maps: K + R + J + 1. Each program reads all matrices, from the
second-level cache. Arithmetic: K M C C_out multiply-adds, at 128 channels in bfloat16 128
operations a byte, below the 230 at which an H200's matrix units become the limit.
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
    check_like,
    check_product,
    empty_map,
    has_large_cores,
    has_matrix_units,
    operand,
)
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.slabs import pointer_of

MAX_CHANNELS = 256
"""Of any map: programs hold all channels of their positions."""


@dataclass(frozen=True)
class ProductSumConfig:
    """Tile: `block_m` positions, `block_c` input channels at once, `stages` of them in flight."""

    block_m: int
    block_c: int
    warps: int
    stages: int

    @classmethod
    def default(
        cls, channels: int, out_channels: int, dtype: torch.dtype, large: bool = True
    ) -> ProductSumConfig:
        """Of wide maps there are few positions, and one program to a core, `large` where its shared
        memory is. Small tiles for 32-bit products, which hold their operands in registers."""
        if dtype.itemsize > 2:
            return cls(16, 16, 4, 1)
        if max(channels, out_channels) <= 32:
            return cls(64, block_of(channels), 4, 4)
        if max(channels, out_channels) <= 64:
            return cls(128, block_of(channels), 4, 3)
        if large and max(channels, out_channels) <= 128:
            return cls(64, block_of(channels), 4, 3)
        return cls(128 if out_channels <= 64 else 64, min(64, block_of(channels)), 8, 3)


@kernel(do_not_specialize=["M"])
def _product_sum_kernel(
    d_ptrs, matrix_ptr, shift_ptr, map_ptrs, statistics_ptr, weight_ptr, out_ptr, M, C, CO,
    K: tl.constexpr, R: tl.constexpr, J: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out on one tile of positions; the maps are y_1 to y_R, x_1 to x_J.

    BLOCKS of BLOCK_C >= C channels, BLOCK_O >= CO, BLOCK_K >= K.
    """
    wait_for_predecessor()
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)[:, None]
    within = lane < M - first
    o = tl.arange(0, BLOCK_O)[None, :]
    entry = first * CO + (lane * CO + o)
    inside = within & (o < CO)

    product = tl.arange(0, BLOCK_K)[:, None]
    shifts = tl.load(shift_ptr + (product * CO + o), mask=(product < K) & (o < CO), other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=ACC) - tl.sum(shifts, axis=0, keep_dims=True)
    if R + J > 0:
        for r in tl.range(0, R + J, num_stages=STAGES):
            value = tl.load(pointer_of(map_ptrs, r, R + J) + entry, mask=inside, other=0.0)
            scale = tl.load(weight_ptr + r).to(ACC)
            distance = value.to(ACC)
            if R > 0:
                normalised = (o < CO) & (r < R)
                mean_ptr = statistics_ptr + r * CO + o
                distance -= tl.load(mean_ptr, mask=normalised, other=0.0)
                scale *= tl.load(mean_ptr + 2 * R * CO, mask=normalised, other=1.0)
            total += scale * distance

    c = tl.arange(0, BLOCK_C)[None, :]
    row = tl.arange(0, BLOCK_O)[:, None]
    for step in range(0, K * BLOCKS):
        k = step // BLOCKS
        channel = step % BLOCKS * BLOCK_C + c
        d_ptr = pointer_of(d_ptrs, k, K) + first * C
        d = tl.load(d_ptr + (lane * C + channel), mask=within & (channel < C), other=0.0)
        matrix = matrix_ptr + k * CO * C + (row * C + channel)
        weight = tl.load(matrix, mask=(row < CO) & (channel < C), other=0.0)
        total = tl.dot(
            d.to(OPERAND), tl.trans(weight.to(OPERAND)), total,
            input_precision="ieee", out_dtype=ACC,
        )  # fmt: skip
    tl.store(out_ptr + entry, total.to(out_ptr.dtype.element_ty), mask=inside)


def serves(d: Tensor, out_channels: int) -> bool:
    """Whether nodes of maps like d, (N, C, H, W), are to be taken as products of them.

    The kernels take 32-bit maps too, but see `has_matrix_units`.
    """
    return max(d.shape[1], out_channels) <= MAX_CHANNELS and has_matrix_units(d)


def product_sum(
    ds: Sequence[Tensor],
    matrices: Tensor,
    shifts: Tensor,
    ys: Sequence[Tensor],
    statistics: Tensor,
    xs: Sequence[Tensor],
    weights: Tensor,
    config: ProductSumConfig | None = None,
) -> Tensor:
    """The sum of products less shifts, normalised ys and xs, these two weighted: (N, C_out, H, W).

    ds: K >= 1 maps (N, C, H, W), channels_last, of one shape and dtype, up to 256 channels;
    matrices: (K, C_out, C) of their dtype, up to 256 rows; ys, xs: R and J maps like the result;
    shifts (K, C_out), statistics (3, R, C_out), mean, variance and inverse deviation of the ys:
    accumulator dtype; weights: (R + J,) of any float dtype; all contiguous. float64 is for the
    interpreter only. Raises `ValueError` naming the argument at fault.
    """
    images, channels, height, width = check_products("ds", ds)
    out_channels = check_matrices("matrices", matrices, ds)
    shape = (images, out_channels, height, width)
    out = empty_map(shape, ds[0])
    check_maps("ys", ys, out)
    check_maps("xs", xs, out)
    check_sums("shifts", shifts, (len(ds), out_channels), ds[0])
    check_sums("statistics", statistics, (3, len(ys), out_channels), ds[0])
    check_dense("weights", weights, (len(ys) + len(xs),), ds[0])
    positions = images * height * width
    config = config or ProductSumConfig.default(
        channels, out_channels, out.dtype, has_large_cores(out)
    )
    _product_sum_kernel[(triton.cdiv(positions, config.block_m),)](
        tuple(ds), matrices, shifts, (*ys, *xs), statistics, weights, out,
        positions, channels, out_channels,
        K=len(ds), R=len(ys), J=len(xs), ACC=accumulator(out.dtype), OPERAND=operand(out.dtype),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        BLOCKS=triton.cdiv(channels, config.block_c), BLOCK_O=block_of(out_channels),
        BLOCK_K=triton.next_power_of_2(len(ds)), STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def block_of(channels: int) -> int:
    """The power of two of at least 16, as products need, that holds so many channels."""
    return max(16, triton.next_power_of_2(channels))


def check_products(name: str, maps: Sequence[Tensor]) -> torch.Size:
    """The shape of these maps, which a product can take; raises `ValueError`."""
    check_maps(name, maps, maps[0] if maps else None)
    check_product(f"{name}[0]", maps[0])
    channels = maps[0].shape[1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"{name}[0]: {channels} channels, need up to {MAX_CHANNELS}")
    return maps[0].shape


def check_matrices(name: str, matrices: Tensor, ds: Sequence[Tensor]) -> int:
    """The rows of matrices (K, rows, C) of the dtype of K maps (N, C, H, W) on their device."""
    rows = matrices.shape[1] if matrices.ndim == 3 else 0
    if rows > MAX_CHANNELS:
        raise ValueError(f"{name}: {rows} output channels, need up to {MAX_CHANNELS}")
    if rows < 1:
        raise ValueError(f"{name}: shape {tuple(matrices.shape)}, need (K, C_out, C)")
    check_dense(name, matrices, (len(ds), rows, ds[0].shape[1]), ds[0])
    if matrices.dtype != ds[0].dtype:
        raise ValueError(f"{name}: dtype {matrices.dtype}, the maps have {ds[0].dtype}")
    return rows


def check_sums(name: str, sums: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises `ValueError` unless contiguous, of this shape and the accumulator dtype of `like`."""
    check_dense(name, sums, shape, like)
    acc = accumulator_dtype(like.dtype)
    if sums.dtype != acc:
        raise ValueError(f"{name}: dtype {sums.dtype}, need {acc}")


def check_gradient(name: str, g: Tensor, ds: Sequence[Tensor]) -> int:
    """The channels of g, (N, C_out, H, W), for maps (N, C, H, W); raises `ValueError`."""
    check_products(name, (g,))
    images, _, height, width = ds[0].shape
    check_like(name, g, (images, g.shape[1], height, width), ds[0])
    if g.dtype != ds[0].dtype:
        raise ValueError(f"{name}: dtype {g.dtype}, the maps have {ds[0].dtype}")
    return g.shape[1]

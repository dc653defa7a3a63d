"""1x1 convolutions of NHWC maps, the input rectified on the way in, statistics on the way out.

Branch b of a launch multiplies its own map by its own weights,

    y[b, m, o] = sum_c w[b, o, c] r(x_b[m, c]),

over the M = N H W positions m, with r(x) = x, max(x, 0) or max(scale[b, c] x + shift[b, c], 0).
The products have operands of the storage dtype, so an affine r is rounded to it, and float32 sums.
While a tile of y is in registers its mean and M2 go out too, so that the batch norm behind the
convolution need not read y for its statistics.

Least traffic, in elements: B M (C + C_out). Arithmetic: B M C C_out multiply-adds; at 128 channels
both ways in bfloat16 that is 64 operations a byte, a third of what an H200's matrix units need to
become the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, check_dense, check_product, empty_map, operand
from lgcnet_fast.kernels.depthwise import rectify
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.tile_statistics import (
    Statistics,
    check_positions,
    empty_partial,
    merge_statistics,
    store_with_statistics,
)


@dataclass(frozen=True)
class ProductConfig:
    """Tile of one program: `block_m` positions by `block_n` output channels, in steps of
    `block_k` input channels, `stages` of them in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @classmethod
    def default(cls, channels: int, out_channels: int) -> ProductConfig:
        """All output channels in one tile up to 128, so that the input is read once."""
        block_n = min(128, max(16, triton.next_power_of_2(out_channels)))
        block_k = min(64, max(16, triton.next_power_of_2(channels)))
        block_m = 64 if block_n >= 64 else 128
        return cls(block_m, block_n, block_k, warps=8 if block_n > 64 else 4, stages=2)

    @classmethod
    def resizing(cls, out_channels: int, dtype: torch.dtype) -> ProductConfig:
        """For an input that is resized on the way in: narrow, as each value has four neighbours.

        32-bit products run outside the matrix units and hold their operands in registers.
        """
        block_n = min(128, max(16, triton.next_power_of_2(out_channels)))
        warps, stages = (4, 2) if dtype.itemsize == 2 else (8, 1)
        return cls(64, block_n, 32, warps if block_n <= 64 else 8, stages)


@triton.jit(do_not_specialize=["M"])
def _pointwise_kernel(
    x_ptrs, w_ptr, scale_ptr, shift_ptr, y_ptr, partial_ptr, M, C, CO,
    BRANCHES: tl.constexpr, RELU: tl.constexpr, AFFINE: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one branch; tiles of the same positions are neighbours in launch order."""
    blocks_n = tl.cdiv(CO, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M)
    channel = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tile = tl.program_id(0) // blocks_n % tiles
    branch = tl.program_id(0) // blocks_n // tiles
    x_ptr = x_ptrs[0]
    for k in tl.static_range(1, BRANCHES):
        if branch == k:
            x_ptr = x_ptrs[k]
    start = tile.to(tl.int64) * BLOCK_M
    position = start + tl.arange(0, BLOCK_M)[:, None]
    x = x_ptr + position * C
    w = w_ptr + (branch * CO + channel).to(tl.int64) * C

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for first in range(0, C, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        value = tl.load(x + c[None, :], mask=(position < M) & (c < C)[None, :], other=0.0)
        if AFFINE:
            scale = tl.load(scale_ptr + branch * C + c, mask=c < C, other=0.0).to(ACC)
            shift = tl.load(shift_ptr + branch * C + c, mask=c < C, other=0.0).to(ACC)
            value = value.to(ACC) * scale[None, :] + shift[None, :]
            value = rectify(value, RELU).to(x_ptr.dtype.element_ty)
        else:
            value = rectify(value, RELU)
        weight = tl.load(w + c[:, None], mask=(c < C)[:, None] & (channel < CO), other=0.0)
        weight = weight.to(x_ptr.dtype.element_ty).to(OPERAND)
        total = tl.dot(value.to(OPERAND), weight, total, input_precision="ieee", out_dtype=ACC)

    y = y_ptr + branch.to(tl.int64) * M * CO
    partial = partial_ptr + (tile.to(tl.int64) * BRANCHES + branch) * (2 * CO)
    count = tl.minimum(M - start, BLOCK_M)
    store_with_statistics(y, partial, total, position, channel, M, CO, count, ACC)


def pointwise(
    maps: Sequence[Tensor],
    weights: Tensor,
    relu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    config: ProductConfig | None = None,
) -> tuple[Tensor, Statistics]:
    """Products of B maps with their weights, (B, N, C_out, H, W), and their batch statistics.

    maps: B of (N, C, H, W), channels_last, of one shape and dtype; weights: (B, C_out, C),
    contiguous, of any float dtype, rounded to the maps'; scale, shift: (B, C), contiguous, of any
    float dtype, both or neither: an affine map of the input, before the ReLU if there is one. Every
    y[b] is a dense channels_last map. float64 is for the interpreter only. Raises `ValueError`
    naming the argument at fault.
    """
    check_maps("maps", maps, maps[0] if len(maps) else None)
    x, branches = maps[0], len(maps)
    check_product("maps[0]", x)
    images, channels, height, width = x.shape
    out_channels = _check_weights(weights, branches, channels, x)
    positions = images * height * width
    check_positions("maps", x, positions)
    if (scale is None) != (shift is None):
        raise ValueError(f"{'scale' if scale is None else 'shift'}: missing, it takes both")
    if scale is None or shift is None:
        scale = shift = weights
        affine = False
    else:
        check_dense("scale", scale, (branches, channels), x)
        check_dense("shift", shift, (branches, channels), x)
        affine = True
    config = config or ProductConfig.default(channels, out_channels)
    y = empty_map((branches, images, out_channels, height, width), x)
    partial = empty_partial(branches, out_channels, positions, config.block_m, x)
    _pointwise_kernel[(len(partial) * triton.cdiv(out_channels, config.block_n) * branches,)](
        tuple(maps), weights, scale, shift, y, partial, positions, channels, out_channels,
        BRANCHES=branches, RELU=relu, AFFINE=affine,
        ACC=accumulator(x.dtype), OPERAND=operand(x.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, merge_statistics(partial, positions, config.block_m, eps)


def _check_weights(weights: Tensor, branches: int, channels: int, x: Tensor) -> int:
    """The output channels; raises `ValueError`."""
    if weights.ndim != 3 or not weights.shape[1]:
        raise ValueError(f"weights: shape {tuple(weights.shape)}, need (branches, C_out, C)")
    out_channels = weights.shape[1]
    check_dense("weights", weights, (branches, out_channels, channels), x)
    return out_channels

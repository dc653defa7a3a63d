"""The 1x1 convolution of a concatenation of resized maps, without the concatenated map.

    y[m, o] = sum_i sum_c w[o, c_i + c] r(resize(x_i)[m, c])

Map i is resized bilinearly (aligned corners) from its own size, or copied where it has the
output's; c_i is the number of channels before it and r is ReLU or the identity. A resized value is
rounded to the storage dtype, as the concatenated map would hold it, then rectified: the ReLU does
not commute with the resizing, so the products cannot move to the smaller map. The gradients are in
concat_pointwise_backward.py.

Least traffic: each map once, y once; the concatenated map (written and read) is what it saves.
Arithmetic: C_out multiply-adds and some 8 operations of resizing a value of the concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import Size, beyond, lower_input
from lgcnet_fast.kernels.common import (
    accumulator,
    check_dense,
    check_product,
    empty_map,
    has_matrix_units,
    operand,
)
from lgcnet_fast.kernels.concat_upsample import check_maps
from lgcnet_fast.kernels.depthwise import rectify
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.rows import four, four_sizes

MAX_OUT_CHANNELS = 128
"""A program of the gradients holds all output channels of its positions."""


@dataclass(frozen=True)
class ProductConfig:
    """Tile of one program: `block_m` positions by `block_n` output channels, in steps of
    `block_k` channels of a map, `stages` of them in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @classmethod
    def default(
        cls, channels: Sequence[int], out_channels: int, resizes: bool, dtype: torch.dtype
    ) -> ProductConfig:
        """All output channels in one tile up to 128, so that the maps are read once.

        Narrow steps where maps are resized, as each value has four neighbours, beside wide tiles,
        and for 32-bit products, which run outside the matrix units and hold their operands in
        registers. Not 64 positions: those would take the matrix instructions of warp groups, which
        Triton 3.6 has compiled wrongly in another launch of several products
        (`TileConfig.is_miscompiled`).
        """
        block_n = min(128, max(16, triton.next_power_of_2(out_channels)))
        narrow = resizes or dtype.itemsize > 2 or block_n > 64
        block_k = min(32 if narrow else 64, max(16, triton.next_power_of_2(max(channels))))
        warps, stages = (4, 2) if dtype.itemsize == 2 else (8, 1)
        return cls(32, block_n, block_k, warps if block_n <= 64 else 8, stages)


@triton.jit
def _taps(position, size_in, size_out, ACC: tl.constexpr):
    """Along one axis: the inputs before and after an output, the weight of the second."""
    before = lower_input(position, size_in, size_out)
    weight = beyond(position, before, size_in, size_out, ACC)
    return before, tl.minimum(before + 1, size_in - 1), weight


@triton.jit
def resized_tile(
    x_ptr, first, lane, c, mask, h, w, C, height, width,
    COPIED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """resize(x) (m, k) at positions `first` + lane (m, 1) of the output and channels c (1, k).

    In the storage dtype, 0 outside `mask`. Neighbours of weight 0 are not loaded. `first` has 64
    bits, as have the offsets that come of it; what is divided has 32.
    """
    if COPIED:
        x = x_ptr + first * C
        value = tl.load(x + (lane * C + c), mask=mask, other=0.0)
    else:
        position = (first + lane).to(tl.int32)
        column = position % width
        row = position // width % height
        image = (position // width // height).to(tl.int64)
        above, below, f = _taps(row, h, height, ACC)
        left, right, g = _taps(column, w, width, ACC)
        upper = x_ptr + (image * h + above) * w * C + c
        lower = x_ptr + (image * h + below) * w * C + c
        down = mask & (f > 0)
        across = mask & (g > 0)
        upper_left = tl.load(upper + left * C, mask=mask, other=0.0).to(ACC)
        upper_right = tl.load(upper + right * C, mask=across, other=0.0).to(ACC)
        lower_left = tl.load(lower + left * C, mask=down, other=0.0).to(ACC)
        lower_right = tl.load(lower + right * C, mask=down & across, other=0.0).to(ACC)
        value = (1 - f) * ((1 - g) * upper_left + g * upper_right)
        value += f * ((1 - g) * lower_left + g * lower_right)
        value = value.to(x_ptr.dtype.element_ty)
    return value


@kernel(do_not_specialize=["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "M", "height", "width"])
def _concat_pointwise_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, w_ptr, y_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, c0, c1, c2, c3, M, height, width, C, CO,
    MAPS: tl.constexpr, COPIED: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y; bit i of COPIED: map i has the output's size."""
    wait_for_predecessor()
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    channels = (c0, c1, c2, c3)
    blocks_n = tl.cdiv(CO, BLOCK_N)
    channel = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    start = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)[:, None]
    within = lane < M - start

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    w = w_ptr + channel * C
    for m in tl.static_range(MAPS):
        for first in range(0, channels[m], BLOCK_K):
            c = first + tl.arange(0, BLOCK_K)
            inside = c < channels[m]
            value = resized_tile(
                x_ptrs[m], start, lane, c[None, :], within & inside[None, :],
                heights[m], widths[m], channels[m], height, width, (COPIED >> m) & 1, ACC,
            )  # fmt: skip
            value = rectify(value, RELU).to(OPERAND)
            weight = tl.load(w + c[:, None], mask=inside[:, None] & (channel < CO), other=0.0)
            weight = weight.to(y_ptr.dtype.element_ty).to(OPERAND)
            total = tl.dot(value, weight, total, input_precision="ieee", out_dtype=ACC)
        w += channels[m]

    y = y_ptr + start * CO + (lane * CO + channel)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=within & (channel < CO))


def serves(x: Tensor, out_channels: int) -> bool:
    """Whether the kernels here and those of the gradients are the way to take for maps like x.

    They take 32-bit maps too, but see `has_matrix_units`.
    """
    return out_channels <= MAX_OUT_CHANNELS and has_matrix_units(x)


def concat_pointwise(
    maps: Sequence[Tensor],
    weight: Tensor,
    size: Size,
    relu: bool = False,
    config: ProductConfig | None = None,
) -> Tensor:
    """The convolution's output (N, C_out, *size), NHWC.

    maps: one to four (N, C_i, h_i, w_i), channels_last, of one dtype; weight: (C_out, sum C_i),
    contiguous, of any float dtype, rounded to the maps'. float64 is for the interpreter only.
    Raises `ValueError` naming the argument at fault.
    """
    channels = check_arguments(maps, weight, size)
    images, (height, width) = maps[0].shape[0], size
    positions = images * height * width
    out_channels, all_channels = weight.shape
    config = config or ProductConfig.default(
        channels, out_channels, resizes(maps, size), maps[0].dtype
    )
    y = empty_map((images, out_channels, height, width), maps[0])
    tiles = triton.cdiv(positions, config.block_m) * triton.cdiv(out_channels, config.block_n)
    _concat_pointwise_kernel[(tiles,)](
        *four(maps), weight, y, *four_sizes(maps), *four(channels),
        positions, height, width, all_channels, out_channels,
        MAPS=len(maps), COPIED=copied(maps, size), RELU=relu,
        ACC=accumulator(y.dtype), OPERAND=operand(y.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def copied(maps: Sequence[Tensor], size: Size) -> int:
    """Bit i: map i has the output's size."""
    return sum((tuple(x.shape[2:]) == tuple(size)) << index for index, x in enumerate(maps))


def resizes(maps: Sequence[Tensor], size: Size) -> bool:
    """Whether any of the maps has another size than the output."""
    return copied(maps, size) != (1 << len(maps)) - 1


def check_arguments(maps: Sequence[Tensor], weight: Tensor, size: Size) -> list[int]:
    """The maps' channels; raises `ValueError`."""
    check_maps(maps, size)
    check_product("maps[0]", maps[0])
    channels = [x.shape[1] for x in maps]
    if weight.ndim != 2 or not weight.shape[0]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, need (C_out, {sum(channels)})")
    check_dense("weight", weight, (weight.shape[0], sum(channels)), maps[0])
    return channels

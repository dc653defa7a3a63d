"""The 1x1 convolution of a concatenation of resized maps, without the concatenated map.

    y[m, o] = sum_i sum_c w[o, c_i + c] r(resize(x_i)[m, c])

Map i is resized bilinearly (aligned corners) from its own size, or copied where it has the
output's; c_i is the number of channels before it and r is ReLU or the identity. A resized value is
rounded to the storage dtype, as the concatenated map would hold it, then rectified: the ReLU does
not commute with the resizing, so the products cannot move to the smaller map. Mean and M2 of every
tile of y go out with it, for the batch norm that follows. The gradients are in
concat_pointwise_backward.py.

Least traffic: each map once, y once; the concatenated map (written and read) is what it saves.
Arithmetic: C_out multiply-adds and some 8 operations of resizing a value of the concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import Size, beyond, lower_input
from lgcnet_fast.kernels.common import accumulator, check_dense, check_product, empty_map, operand
from lgcnet_fast.kernels.concat_upsample import check_maps
from lgcnet_fast.kernels.depthwise import rectify
from lgcnet_fast.kernels.pointwise import ProductConfig
from lgcnet_fast.kernels.rows import four, four_sizes
from lgcnet_fast.kernels.tile_statistics import (
    Statistics,
    check_positions,
    empty_partial,
    merge_statistics,
    store_with_statistics,
)


@triton.jit
def locate(position, height, width):
    """Image, row and column of positions of the output."""
    column = position % width
    row = position // width % height
    return (position // width // height).to(tl.int64), row, column


@triton.jit
def _taps(position, size_in, size_out, ACC: tl.constexpr):
    """Along one axis: the inputs before and after an output, the weight of the second."""
    before = lower_input(position, size_in, size_out)
    weight = beyond(position, before, size_in, size_out, ACC)
    return before, tl.minimum(before + 1, size_in - 1), weight


@triton.jit
def resized_tile(
    x_ptr, place, c, mask, h, w, C, height, width,
    COPIED: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """r(resize(x)) (m, k) at `place`, (image, row, column) each (m, 1), and channels c (1, k).

    In the storage dtype, 0 outside `mask`. Neighbours of weight 0 are not loaded.
    """
    image, row, column = place
    if COPIED:
        offset = ((image * h + row) * w + column) * C + c
        value = tl.load(x_ptr + offset, mask=mask, other=0.0)
    else:
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
    return rectify(value, RELU)


@triton.jit(
    do_not_specialize=["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "M", "height", "width"]
)
def _concat_pointwise_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, w_ptr, y_ptr, partial_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, c0, c1, c2, c3, M, height, width, C, CO,
    MAPS: tl.constexpr, COPIED: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y; bit i of COPIED: map i has the output's size."""
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    channels = (c0, c1, c2, c3)
    blocks_n = tl.cdiv(CO, BLOCK_N)
    channel = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tile = tl.program_id(0) // blocks_n
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    place = locate(position, height, width)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    w = w_ptr + channel * C
    for m in tl.static_range(MAPS):
        for first in range(0, channels[m], BLOCK_K):
            c = first + tl.arange(0, BLOCK_K)
            inside = c < channels[m]
            value = resized_tile(
                x_ptrs[m], place, c[None, :], (position < M) & inside[None, :],
                heights[m], widths[m], channels[m], height, width, (COPIED >> m) & 1, RELU, ACC,
            )  # fmt: skip
            weight = tl.load(w + c[:, None], mask=inside[:, None] & (channel < CO), other=0.0)
            weight = weight.to(y_ptr.dtype.element_ty).to(OPERAND)
            total = tl.dot(value.to(OPERAND), weight, total, input_precision="ieee", out_dtype=ACC)
        w += channels[m]

    partial = partial_ptr + tile.to(tl.int64) * (2 * CO)
    count = tl.minimum(M - tile * BLOCK_M, BLOCK_M)
    store_with_statistics(y_ptr, partial, total, position.to(tl.int64), channel, M, CO, count, ACC)


def concat_pointwise(
    maps: Sequence[Tensor],
    weight: Tensor,
    size: Size,
    relu: bool = False,
    eps: float = 1e-5,
    config: ProductConfig | None = None,
) -> tuple[Tensor, Statistics]:
    """The convolution's output (N, C_out, *size), NHWC, and its batch statistics, (1, C_out) each.

    maps: one to four (N, C_i, h_i, w_i), channels_last, of one dtype; weight: (C_out, sum C_i),
    contiguous, of any float dtype, rounded to the maps'. float64 is for the interpreter only.
    Raises `ValueError` naming the argument at fault.
    """
    channels = check_arguments(maps, weight, size)
    images, (height, width) = maps[0].shape[0], size
    positions = images * height * width
    check_positions("size", maps[0], positions)
    out_channels, all_channels = weight.shape
    config = config or ProductConfig.resizing(out_channels, maps[0].dtype)
    y = empty_map((images, out_channels, height, width), maps[0])
    partial = empty_partial(1, out_channels, positions, config.block_m, maps[0])
    _concat_pointwise_kernel[(len(partial) * triton.cdiv(out_channels, config.block_n),)](
        *four(maps), weight, y, partial, *four_sizes(maps), *four(channels),
        positions, height, width, all_channels, out_channels,
        MAPS=len(maps), COPIED=copied(maps, size), RELU=relu,
        ACC=accumulator(y.dtype), OPERAND=operand(y.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, merge_statistics(partial, positions, config.block_m, eps)


def copied(maps: Sequence[Tensor], size: Size) -> int:
    """Bit i: map i has the output's size."""
    return sum((tuple(x.shape[2:]) == tuple(size)) << index for index, x in enumerate(maps))


def check_arguments(maps: Sequence[Tensor], weight: Tensor, size: Size) -> list[int]:
    """The maps' channels; raises `ValueError`."""
    check_maps(maps, size)
    check_product("maps[0]", maps[0])
    channels = [x.shape[1] for x in maps]
    if weight.ndim != 2 or not weight.shape[0]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, need (C_out, {sum(channels)})")
    check_dense("weight", weight, (weight.shape[0], sum(channels)), maps[0])
    return channels

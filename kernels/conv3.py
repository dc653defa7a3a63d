"""Dense 3x3 convolution of an NHWC map, padding 1, stride 1 or 2, forward, with batch statistics.

    y[n, i, j, o] = sum_{u, v} sum_c w[o, c, u, v] r(x[n, s i + u, s j + v, c])

with u, v in {-1, 0, 1}, r = ReLU or the identity and ceil(H / s) x ceil(W / s) outputs: a matrix
product of 9 C terms whose left operand is gathered from the map, never stored. Mean and M2 of every
tile of y go out with it, for the batch norm that follows.

Least traffic, in elements: x, y and the weights once; the nine readings of x meet in the caches.
Arithmetic: 9 C C_out multiply-adds an output; from 64 channels on it is the matrix units, not the
memory, that set the floor on an H200.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    check_like,
    check_map,
    check_product,
    empty_map,
    operand,
)
from lgcnet_fast.kernels.concat_pointwise import locate
from lgcnet_fast.kernels.depthwise import rectify
from lgcnet_fast.kernels.pointwise import ProductConfig
from lgcnet_fast.kernels.tile_statistics import (
    Statistics,
    check_positions,
    empty_partial,
    merge_statistics,
    store_with_statistics,
)


@triton.jit(do_not_specialize=["M"])
def _conv3_kernel(
    x_ptr, w_ptr, y_ptr, partial_ptr, M, H, W, HO, WO, C, CO,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y, summed over the nine taps and the blocks of input channels."""
    blocks_n = tl.cdiv(CO, BLOCK_N)
    channel = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tile = tl.program_id(0) // blocks_n
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    image, row, column = locate(position, HO, WO)
    row, column = STRIDE * row - 1, STRIDE * column - 1
    x = x_ptr + ((image * H + row) * W + column) * C
    w = w_ptr + channel * (9 * C)

    blocks_k = tl.cdiv(C, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(9 * blocks_k):
        tap = step // blocks_k
        u, v = tap // 3, tap % 3
        c = step % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (row + u >= 0) & (row + u < H) & (column + v >= 0) & (column + v < W)
        mask = (position < M) & inside & (c < C)[None, :]
        value = rectify(tl.load(x + (u * W + v) * C + c[None, :], mask=mask, other=0.0), RELU)
        weight = tl.load(
            w + tap * C + c[:, None], mask=(c < C)[:, None] & (channel < CO), other=0.0
        )
        weight = weight.to(x_ptr.dtype.element_ty).to(OPERAND)
        total = tl.dot(value.to(OPERAND), weight, total, input_precision="ieee", out_dtype=ACC)

    partial = partial_ptr + tile.to(tl.int64) * (2 * CO)
    count = tl.minimum(M - tile * BLOCK_M, BLOCK_M)
    store_with_statistics(y_ptr, partial, total, position.to(tl.int64), channel, M, CO, count, ACC)


def conv3(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    relu: bool = False,
    eps: float = 1e-5,
    config: ProductConfig | None = None,
) -> tuple[Tensor, Statistics]:
    """The output (N, C_out, ceil(H / stride), ceil(W / stride)), NHWC, and its batch statistics.

    x: (N, C, H, W), channels_last; weight: (C_out, C, 3, 3), channels_last as well, of any float
    dtype, rounded to x's; statistics: (1, C_out) each. float64 is for the interpreter only. Raises
    `ValueError` naming the argument at fault.
    """
    check_map("x", x)
    check_product("x", x)
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride}, need 1 or 2")
    images, channels, height, width = x.shape
    check_map("weight", weight)
    out_channels = weight.shape[0]
    check_like("weight", weight, (out_channels, channels, 3, 3), x)
    out_height, out_width = -(-height // stride), -(-width // stride)
    positions = images * out_height * out_width
    check_positions("x", x, positions)
    config = config or default_config(channels, out_channels, x.dtype)
    y = empty_map((images, out_channels, out_height, out_width), x)
    partial = empty_partial(1, out_channels, positions, config.block_m, x)
    _conv3_kernel[(len(partial) * triton.cdiv(out_channels, config.block_n),)](
        x, weight, y, partial,
        positions, height, width, out_height, out_width, channels, out_channels,
        STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype), OPERAND=operand(x.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, merge_statistics(partial, positions, config.block_m, eps)


def default_config(channels: int, out_channels: int, dtype: torch.dtype) -> ProductConfig:
    """Steps of the most channels that leave none of them idle, several steps in flight."""
    config = ProductConfig.default(channels, out_channels)
    fitting = [block for block in (64, 32, 16) if channels % block == 0]
    stages = 3 if dtype.itemsize == 2 else 2
    return replace(config, block_k=fitting[0] if fitting else config.block_k, stages=stages)

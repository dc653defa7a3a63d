"""Gradients of `concat_pointwise`, from g = dy, the gradient of the product.

Of the concatenated map and of the weights

    dv[m, c] = [v[m, c] > 0] sum_o w[o, c] g[m, o],    dw[o, c] = sum_m g[m, o] r(v[m, c])

with v the resized maps, computed again from the maps themselves; without a ReLU dv needs none of
them. `concat_upsample_backward` takes dv to the maps. dw comes in two stages: every program sums
its share of the positions, the shares are added in a fixed order.

Least traffic, in elements a position, of C channels in all: C + C_out for dv once the maps are in
the cache, C_out and the maps for dw. Arithmetic: C C_out multiply-adds each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import Size
from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_like,
    check_map,
    empty_map,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.concat_pointwise import (
    check_arguments,
    copied,
    locate,
    resized_tile,
)
from lgcnet_fast.kernels.concat_upsample_backward import concat_upsample_backward
from lgcnet_fast.kernels.rows import four, four_sizes

MAX_OUT_CHANNELS = 128
"""A program holds all output channels of its positions."""


@dataclass(frozen=True)
class ProductGradConfig:
    """Tile: `block_m` positions, `block_k` channels of a map; `programs` share the sums of dw."""

    block_m: int
    block_k: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def default(
        cls, channels: Sequence[int], positions: int, dtype: torch.dtype
    ) -> ProductGradConfig:
        """Four programs for each of 132 cores, or all that the positions need.

        Warps and stages as in `ProductConfig.resizing`.
        """
        blocks = sum(triton.cdiv(count, 32) for count in channels)
        programs = min(triton.cdiv(positions, 64), max(528 // blocks, 1))
        warps, stages = (4, 2) if dtype.itemsize == 2 else (8, 1)
        return cls(64, 32, warps, stages, programs)


SIZES = ["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "M", "height", "width"]


@triton.jit(do_not_specialize=SIZES)
def _input_grad_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, w_ptr, dy_ptr, dx_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, c0, c1, c2, c3, M, height, width, C, CO,
    MAPS: tl.constexpr, COPIED: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dv of BLOCK_M positions, all channels; BLOCK_O >= CO."""
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    channels = (c0, c1, c2, c3)
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    place = locate(position, height, width)
    o = tl.arange(0, BLOCK_O)
    dy = dy_ptr + position.to(tl.int64) * CO + o[None, :]
    g = tl.load(dy, mask=(position < M) & (o < CO)[None, :], other=0.0).to(OPERAND)

    w = w_ptr + o[:, None] * C
    dx = dx_ptr + position.to(tl.int64) * C
    for m in tl.static_range(MAPS):
        for first in range(0, channels[m], BLOCK_K):
            c = first + tl.arange(0, BLOCK_K)[None, :]
            mask = (position < M) & (c < channels[m])
            weight = tl.load(w + c, mask=(o < CO)[:, None] & (c < channels[m]), other=0.0)
            weight = weight.to(dy_ptr.dtype.element_ty).to(OPERAND)
            value = tl.dot(g, weight, input_precision="ieee", out_dtype=ACC)
            if RELU:
                v = resized_tile(
                    x_ptrs[m], place, c, mask, heights[m], widths[m], channels[m], height, width,
                    (COPIED >> m) & 1, False, ACC,
                )  # fmt: skip
                # Where v is NaN the gradient passes, as PyTorch's does.
                value = tl.where(v.to(ACC) <= 0.0, 0.0, value)
            tl.store(dx + c, value.to(dx_ptr.dtype.element_ty), mask=mask)
        w += channels[m]
        dx += channels[m]


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def _weight_grad_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, dy_ptr, share_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, c0, c1, c2, c3, M, height, width, C, CO, programs,
    MAPS: tl.constexpr, COPIED: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th tile of positions, BLOCK_K channels of one map."""
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    channels = (c0, c1, c2, c3)
    program = tl.program_id(0) % programs
    block = tl.program_id(0) // programs
    o = tl.arange(0, BLOCK_O)
    share = share_ptr + program.to(tl.int64) * CO * C + o[:, None] * C
    for m in tl.static_range(MAPS):
        if (block >= 0) & (block * BLOCK_K < channels[m]):
            c = block * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            total = tl.zeros((BLOCK_O, BLOCK_K), dtype=ACC)
            for first in range(program * BLOCK_M, M, programs * BLOCK_M):
                position = first + tl.arange(0, BLOCK_M)
                v = resized_tile(
                    x_ptrs[m], locate(position[:, None], height, width), c,
                    (position < M)[:, None] & (c < channels[m]), heights[m], widths[m],
                    channels[m], height, width, (COPIED >> m) & 1, RELU, ACC,
                )  # fmt: skip
                dy = dy_ptr + position.to(tl.int64)[None, :] * CO + o[:, None]
                g = tl.load(dy, mask=(position < M)[None, :] & (o < CO)[:, None], other=0.0)
                total = tl.dot(
                    g.to(OPERAND), v.to(OPERAND), total, input_precision="ieee", out_dtype=ACC
                )
            tl.store(share + c, total, mask=(o < CO)[:, None] & (c < channels[m]))
        # The next map's blocks come after this one's.
        block -= tl.cdiv(channels[m], BLOCK_K)
        share += channels[m]


def concat_pointwise_input_grad(
    dy: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    size: Size,
    relu: bool = False,
    config: ProductGradConfig | None = None,
) -> list[Tensor]:
    """Gradients of the maps of `concat_pointwise`, like them.

    dy: as its output, (N, C_out, *size), channels_last, of the maps' dtype, up to 128 channels; the
    others as there. Raises `ValueError` naming the argument at fault.
    """
    channels = check_arguments(maps, weight, size)
    _check_dy(dy, maps, weight, size)
    images, all_channels, positions = dy.shape[0], sum(channels), dy.numel() // dy.shape[1]
    config = config or ProductGradConfig.default(channels, positions, dy.dtype)
    dv = empty_map((images, all_channels, *size), dy)
    _input_grad_kernel[(triton.cdiv(positions, config.block_m),)](
        *four(maps), weight, dy, dv, *four_sizes(maps), *four(channels),
        positions, *size, all_channels, dy.shape[1],
        **_options(dy, maps, size, relu, config),
    )  # fmt: skip
    return concat_upsample_backward(dv, channels, [(x.shape[2], x.shape[3]) for x in maps])


def concat_pointwise_weight_grad(
    dy: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    size: Size,
    relu: bool = False,
    config: ProductGradConfig | None = None,
) -> Tensor:
    """dw of `concat_pointwise`: (C_out, sum C_i) in the accumulator's dtype.

    Of `weight` only the shape counts; the others as in `concat_pointwise_input_grad`. Raises
    `ValueError` naming the argument at fault.
    """
    channels = check_arguments(maps, weight, size)
    _check_dy(dy, maps, weight, size)
    positions = dy.numel() // dy.shape[1]
    config = config or ProductGradConfig.default(channels, positions, dy.dtype)
    shares = dy.new_empty(config.programs, *weight.shape, dtype=accumulator_dtype(dy.dtype))
    blocks = sum(triton.cdiv(count, config.block_k) for count in channels)
    _weight_grad_kernel[(config.programs * blocks,)](
        *four(maps), dy, shares, *four_sizes(maps), *four(channels),
        positions, *size, sum(channels), dy.shape[1], config.programs,
        **_options(dy, maps, size, relu, config),
    )  # fmt: skip
    return sum_rows(shares)


def _options(
    dy: Tensor, maps: Sequence[Tensor], size: Size, relu: bool, config: ProductGradConfig
) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "MAPS": len(maps),
        "COPIED": copied(maps, size),
        "RELU": relu,
        "ACC": accumulator(dy.dtype),
        "OPERAND": operand(dy.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_O": max(16, triton.next_power_of_2(dy.shape[1])),
        "BLOCK_K": config.block_k,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _check_dy(dy: Tensor, maps: Sequence[Tensor], weight: Tensor, size: Size) -> None:
    """Raises `ValueError` unless dy is like the output for these maps."""
    check_map("dy", dy)
    check_like("dy", dy, (maps[0].shape[0], weight.shape[0], *size), maps[0])
    if dy.dtype != maps[0].dtype:
        raise ValueError(f"dy: dtype {dy.dtype}, maps[0] has {maps[0].dtype}")
    if dy.shape[1] > MAX_OUT_CHANNELS:
        raise ValueError(f"dy: {dy.shape[1]} channels, need up to {MAX_OUT_CHANNELS}")

"""Gradients of `concat_pointwise`, from g = dy, the gradient of the product.

Of the resized maps v_i and of the weights

    dv_i[m, c] = [v_i[m, c] > 0] sum_o w[o, c_i + c] g[m, o]
    dw[o, c_i + c] = sum_m g[m, o] r(v_i[m, c])

in one pass, with v_i computed again from the maps themselves. Where map i has the output's size,
dv_i is its gradient; the others' stand side by side, for `concat_upsample_backward` to take them to
the maps. A program walks tiles of positions of a block of one map's channels, whose columns of dv
and dw depend on no other. dw comes in two stages: every program sums its tiles, the shares are
added in a fixed order.

Least traffic, in elements a position, of C channels in all: 2 C + C_out. Arithmetic: 2 C C_out
multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
)
from lgcnet_fast.kernels.concat_pointwise import (
    MAX_OUT_CHANNELS,
    check_arguments,
    resized_tile,
    resizes,
)
from lgcnet_fast.kernels.concat_upsample_backward import concat_upsample_backward
from lgcnet_fast.kernels.depthwise import rectify
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.pointwise_backward import ProductGradientsConfig, summed
from lgcnet_fast.kernels.rows import four, four_sizes

BLOCK_M, BLOCK_C = 32, 32
"""Not 64, for the reason given at `ProductConfig.default`; more channels would spill, too."""
SIZES = ["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "M", "height", "width"]


@kernel(do_not_specialize=[*SIZES, "programs"])
def _concat_gradients_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, dx0_ptr, dx1_ptr, dx2_ptr, dx3_ptr, w_ptr, dy_ptr, share_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, c0, c1, c2, c3, p0, p1, p2, p3,
    M, height, width, C, CO, programs,
    MAPS: tl.constexpr, RESIZES: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th tile of positions, BLOCK_C channels of one map.

    dx: dv of the maps, whose positions are p elements apart; BLOCK_O >= CO. Unless RESIZES, all
    maps have the output's size. Blocks of channels of the same positions are neighbours in launch
    order.
    """
    wait_for_predecessor()
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    dx_ptrs = (dx0_ptr, dx1_ptr, dx2_ptr, dx3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    channels = (c0, c1, c2, c3)
    pitches = (p0, p1, p2, p3)
    blocks = 0
    for m in tl.static_range(MAPS):
        blocks += tl.cdiv(channels[m], BLOCK_C)
    block = tl.program_id(0) % blocks
    # 64 bits, as are the offsets into maps that come of it.
    program = (tl.program_id(0) // blocks).to(tl.int64)

    # The map of this block, the number of blocks and of channels in front of it.
    x_ptr, dx_ptr, h, w, count, pitch = x0_ptr, dx0_ptr, h0, w0, c0, p0
    own_blocks = 0
    own_channels = 0
    passed_blocks = tl.cdiv(c0, BLOCK_C)
    passed_channels = c0
    for m in tl.static_range(1, MAPS):
        here = block >= passed_blocks
        if here:
            x_ptr = x_ptrs[m]
            dx_ptr = dx_ptrs[m]
        h = tl.where(here, heights[m], h)
        w = tl.where(here, widths[m], w)
        count = tl.where(here, channels[m], count)
        pitch = tl.where(here, pitches[m], pitch)
        own_blocks = tl.where(here, passed_blocks, own_blocks)
        own_channels = tl.where(here, passed_channels, own_channels)
        passed_blocks += tl.cdiv(channels[m], BLOCK_C)
        passed_channels += channels[m]

    lane = tl.arange(0, BLOCK_M)[:, None]
    o = tl.arange(0, BLOCK_O)
    c = (block - own_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    entry = o[:, None] * C + (own_channels + c)
    inside = (o < CO)[:, None] & (c < count)
    weight = tl.load(w_ptr + entry, mask=inside, other=0.0)
    weight = weight.to(dy_ptr.dtype.element_ty).to(OPERAND)
    total = tl.zeros((BLOCK_C, BLOCK_O), dtype=ACC)
    for first in range(program * BLOCK_M, M, programs * BLOCK_M):
        within = lane < M - first
        mask = within & (c < count)
        v = resized_tile(
            x_ptr, first, lane, c, mask, h, w, count, height, width, not RESIZES, ACC
        )  # fmt: skip
        dy = dy_ptr + first * CO + (lane * CO + o[None, :])
        g = tl.load(dy, mask=within & (o < CO)[None, :], other=0.0).to(OPERAND)
        r = rectify(v, RELU).to(OPERAND)
        total = tl.dot(tl.trans(r), g, total, input_precision="ieee", out_dtype=ACC)
        dv = tl.dot(g, weight, input_precision="ieee", out_dtype=ACC)
        if RELU:
            # Where v is NaN the gradient passes, as PyTorch's does.
            dv = tl.where(v.to(ACC) <= 0.0, 0.0, dv)
        dx = dx_ptr + first * pitch + (lane * pitch + c)
        tl.store(dx, dv.to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(share_ptr + program * CO * C + entry, tl.trans(total), mask=inside)


def default_config(maps: Sequence[Tensor], out_channels: int, size: Size) -> ProductGradientsConfig:
    """As for as many products as there are blocks of BLOCK_C channels."""
    blocks = sum(triton.cdiv(x.shape[1], BLOCK_C) for x in maps)
    positions = maps[0].shape[0] * size[0] * size[1]
    default = ProductGradientsConfig.default
    config = default(blocks, positions, BLOCK_C, out_channels, maps[0].dtype)
    return replace(config, block_m=BLOCK_M)


def concat_pointwise_backward(
    dy: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    size: Size,
    relu: bool = False,
    config: ProductGradientsConfig | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the maps, like them, and of the weight, (C_out, sum C_i) in the accumulator's
    dtype.

    dy: as the output of `concat_pointwise`, (N, C_out, *size), channels_last, of the maps' dtype,
    up to 128 channels; the others as there. Raises `ValueError` naming the argument at fault.
    """
    channels = check_arguments(maps, weight, size)
    _check_dy(dy, maps, weight, size)
    positions, (out_channels, all_channels) = dy.numel() // dy.shape[1], weight.shape
    config = config or default_config(maps, out_channels, size)
    gradients, resized = _empty_gradients(maps, size)
    shares = dy.new_empty(config.programs, *weight.shape, dtype=accumulator_dtype(dy.dtype))
    blocks = sum(triton.cdiv(count, config.block_c) for count in channels)
    _concat_gradients_kernel[(config.programs * blocks,)](
        *four(maps), *four(gradients), weight, dy, shares, *four_sizes(maps), *four(channels),
        *four([dv.stride(3) for dv in gradients]),
        positions, *size, all_channels, out_channels, config.programs,
        MAPS=len(maps), RESIZES=resizes(maps, size), RELU=relu,
        ACC=accumulator(dy.dtype), OPERAND=operand(dy.dtype),
        BLOCK_M=config.block_m, BLOCK_O=max(16, triton.next_power_of_2(out_channels)),
        BLOCK_C=config.block_c, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if resized is not None:
        others = [i for i, x in enumerate(maps) if tuple(x.shape[2:]) != tuple(size)]
        shapes = [(maps[i].shape[2], maps[i].shape[3]) for i in others]
        found = concat_upsample_backward(resized, [channels[i] for i in others], shapes)
        for index, dx in zip(others, found, strict=True):
            gradients[index] = dx
    return gradients, summed(shares)


def _empty_gradients(maps: Sequence[Tensor], size: Size) -> tuple[list[Tensor], Tensor | None]:
    """For dv: maps of their own where they are the gradients, parts of the second elsewhere."""
    fits = [tuple(x.shape[2:]) == tuple(size) for x in maps]
    channels = [0 if fit else x.shape[1] for x, fit in zip(maps, fits, strict=True)]
    together = None
    if sum(channels):
        together = empty_map((maps[0].shape[0], sum(channels), *size), maps[0])
    parts: list[Tensor] = []
    first = 0
    for x, count in zip(maps, channels, strict=True):
        if together is None or not count:
            parts.append(empty_map(tuple(x.shape), x))
        else:
            parts.append(together[:, first : first + count])
        first += count
    return parts, together


def _check_dy(dy: Tensor, maps: Sequence[Tensor], weight: Tensor, size: Size) -> None:
    """Raises `ValueError` unless dy is like the output for these maps."""
    check_map("dy", dy)
    check_like("dy", dy, (maps[0].shape[0], weight.shape[0], *size), maps[0])
    if dy.dtype != maps[0].dtype:
        raise ValueError(f"dy: dtype {dy.dtype}, maps[0] has {maps[0].dtype}")
    if dy.shape[1] > MAX_OUT_CHANNELS:
        raise ValueError(f"dy: {dy.shape[1]} channels, need up to {MAX_OUT_CHANNELS}")

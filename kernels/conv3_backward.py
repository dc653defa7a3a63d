"""Weight gradients of dense 3x3 convolutions of NHWC maps, padding 1, stride 1.

For B convolutions of equal shapes, of r(x) = x or relu(x), with g = dy and u, v in {-1, 0, 1},

    dw[b, o, u, v, c] = sum_{n, i, j} g_b[n, i, j - v, o] r(x_b[n, i + u, j, c])

where what lies outside the maps is zero. The rows of r(x) are the same for every v, those of g for
every u. A program holds all nine sums of a block of channels while it walks down columns of the
maps: the next row of positions needs g as the three v have it, and one new row of x, which then
stays in registers for three rows. It sums its share of the positions, `summed` adds the shares in a
fixed order.

Least traffic, in elements: B M (C + C_out) for M = N H W positions. Each block of input channels
reads g three times, each block of output channels x. Arithmetic: 9 B M C C_out multiply-adds.
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
    check_like,
    check_product,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.conv3 import rectified
from lgcnet_fast.kernels.launches import INTERPRETED, kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.slabs import pointer_of

_INTERPRETED = tl.constexpr(INTERPRETED)
RESIDENT = 132
"""Programs, one on each multiprocessor of an H200, half of whose registers it takes: few shares to
add up, and room for what runs beside."""
MANY_SUMS = 2**17
"""Of a share: tiles of more columns than rows still fill the device."""
FEWEST_ROWS = 8
"""Of a walk, so that those with which it begins do not count."""


@dataclass(frozen=True)
class WeightGradConfig:
    """Of one program: `block_p` columns of `rows` rows at a time, of which `stages` are on their
    way, `block_o` by `block_c` channels; `programs` share the positions of a convolution."""

    block_p: int
    block_o: int
    block_c: int
    rows: int
    warps: int
    programs: int
    stages: int

    @classmethod
    def default(cls, branches: int, shape: Sequence[int], out_channels: int) -> WeightGradConfig:
        """Small blocks where few channels make small shares; shape: of a map, (N, C, H, W)."""
        if min(shape[1], out_channels) >= 64:
            return cls.of_tile(branches, shape, out_channels, 32, 32, 64, warps=4)
        small = 4 * RESIDENT
        return cls.of_tile(branches, shape, out_channels, 32, 32, 16, warps=2, resident=small)

    @classmethod
    def of_tile(
        cls, branches: int, shape: Sequence[int], out_channels: int,
        block_p: int, block_o: int, block_c: int, warps: int = 8, resident: int = RESIDENT,
        stages: int = 3,
    ) -> WeightGradConfig:  # fmt: skip
        """Up to `resident` programs, and the walks done first; each loads two rows more."""
        images, channels, height, width = shape
        block_o = min(block_o, max(16, triton.next_power_of_2(out_channels)))
        block_c = min(block_c, max(16, triton.next_power_of_2(channels)))
        blocks = triton.cdiv(out_channels, block_o) * triton.cdiv(channels, block_c)
        most = max(1, resident // (branches * blocks))
        strips = images * triton.cdiv(width, block_p)

        def of_a_program(rows: int) -> int:
            return triton.cdiv(strips * triton.cdiv(height, rows), most)

        walks = range(1, triton.cdiv(height, FEWEST_ROWS) + 1)
        rows = min(
            (triton.cdiv(height, count) for count in walks),
            key=lambda rows: of_a_program(rows) * (rows + 2),
        )
        programs = triton.cdiv(strips * triton.cdiv(height, rows), of_a_program(rows))
        return cls(block_p, block_o, block_c, rows, warps, programs, stages)


@triton.jit
def _row(map_ptr, image, row, column, channel, H, W, C, OPERAND: tl.constexpr):
    """Columns of a row of a map, zero outside of it.

    column: (BLOCK_P, 1); channel: (1, channels).
    """
    row_ptr = map_ptr + (image * H + row).to(tl.int64) * W * C
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    value = tl.load(row_ptr + (column * C + channel), mask=inside & (channel < C), other=0.0)
    return value.to(OPERAND)


@triton.jit
def _rectified_row(
    x_ptr, image, row, column, c, H, W, C, RELU: tl.constexpr, OPERAND: tl.constexpr
):  # fmt: skip
    """A row of r(x), channels first."""
    x = _row(x_ptr, image, row, column, c, H, W, C, OPERAND)
    if RELU:
        x = rectified(x)
    return tl.trans(x)


@triton.jit
def _anew(x):
    """x, which Triton takes for the result of a computation.

    It pipelines no loop that hands on a value unchanged, and the left operand of a product stays in
    registers only if something has been computed.
    """
    if not _INTERPRETED:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True,
            pack=32 // x.dtype.primitive_bitwidth,
        )  # fmt: skip
    return x


@triton.jit
def _added(sums, x, g):
    """Of one u: the sums of all v, with the products of a row added."""
    added = ()
    for v in tl.static_range(3):
        total = tl.dot(x, g[v], sums[v], input_precision="ieee", out_dtype=sums[v].dtype)
        added = added + (total,)
    return added


@triton.jit
def _zeros(BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, ACC: tl.constexpr):
    """Three blocks of them."""
    rows = ()
    for _ in tl.static_range(3):
        rows = rows + (tl.zeros((BLOCK_C, BLOCK_O), dtype=ACC),)
    return rows


@triton.jit
def _store_shares(share, sums, u, o, c, C, CO):
    """Of the taps of a u."""
    for v in tl.static_range(3):
        entry = share + ((o * 9 + u * 3 + v) * C + c)
        tl.store(entry, tl.trans(sums[v]), mask=(o < CO) & (c < C))


@kernel(do_not_specialize=["images", "rows", "programs"])
def _conv3_weight_grad_kernel(
    dy_ptrs, x_ptrs, share_ptr, images, H, W, C, CO, rows, programs,
    BRANCHES: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th walk of a convolution, for one block of channels.

    Blocks of channels of the same positions are neighbours in launch order.
    """
    wait_for_predecessor()
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks = blocks_c * tl.cdiv(CO, BLOCK_O)
    block = tl.program_id(0) % blocks
    c = (block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    o = (block // blocks_c * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
    program = tl.program_id(0) // blocks % programs
    branch = tl.program_id(0) // blocks // programs
    dy_ptr = pointer_of(dy_ptrs, branch, BRANCHES)
    x_ptr = pointer_of(x_ptrs, branch, BRANCHES)

    # By u, and by v in each.
    above = _zeros(BLOCK_C, BLOCK_O, ACC)
    level = _zeros(BLOCK_C, BLOCK_O, ACC)
    below = _zeros(BLOCK_C, BLOCK_O, ACC)
    strips, segments = tl.cdiv(W, BLOCK_P), tl.cdiv(H, rows)
    for walk in range(program, images * strips * segments, programs):
        first = walk % segments * rows
        column = (walk // segments % strips * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
        image = walk // segments // strips
        north = _rectified_row(x_ptr, image, first - 1, column, c, H, W, C, RELU, OPERAND)
        middle = _rectified_row(x_ptr, image, first, column, c, H, W, C, RELU, OPERAND)
        for row in tl.range(first, min(first + rows, H), num_stages=STAGES):
            south = _rectified_row(x_ptr, image, row + 1, column, c, H, W, C, RELU, OPERAND)
            g = ()
            for v in tl.static_range(3):
                shifted = tl.where(column < W, column + (1 - v), W)
                g = g + (_row(dy_ptr, image, row, shifted, o, H, W, CO, OPERAND),)
            above = _added(above, _anew(north), g)
            level = _added(level, _anew(middle), g)
            below = _added(below, south, g)
            # Its use makes the matrix units finish all products, so that the next row does not
            # overwrite registers that they still read.
            below = (below[0], below[1], _anew(below[2]))
            north, middle = _anew(middle), _anew(south)

    share = share_ptr + (program * BRANCHES + branch).to(tl.int64) * CO * 9 * C
    o = (block // blocks_c * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    _store_shares(share, above, 0, o, c, C, CO)
    _store_shares(share, level, 1, o, c, C, CO)
    _store_shares(share, below, 2, o, c, C, CO)


def conv3_weight_grad(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    relu: bool = False,
    config: WeightGradConfig | None = None,
) -> Tensor:
    """The shares (programs, B, C_out, 3, 3, C) of dw, in the accumulator's dtype, for `summed`.

    dys: the gradients of B convolutions, (N, C_out, H, W); xs: their maps, (N, C, H, W); all
    channels_last, of one dtype; relu: the convolutions are of relu(x). float64 is for the
    interpreter only. Raises `ValueError` naming the argument at fault.
    """
    check_maps("dys", dys, dys[0] if len(dys) else None)
    check_maps("xs", xs, xs[0] if len(xs) else None)
    if len(dys) != len(xs):
        raise ValueError(f"dys: {len(dys)} maps, xs: {len(xs)}")
    images, channels, height, width = xs[0].shape
    out_channels = dys[0].shape[1]
    check_like("dys[0]", dys[0], (images, out_channels, height, width), xs[0])
    if dys[0].dtype != xs[0].dtype:
        raise ValueError(f"dys[0]: dtype {dys[0].dtype}, xs[0] has {xs[0].dtype}")
    check_product("xs[0]", xs[0])
    branches = len(xs)
    config = config or WeightGradConfig.default(branches, xs[0].shape, out_channels)
    shares = xs[0].new_empty(
        (config.programs, branches, out_channels, 3, 3, channels),
        dtype=accumulator_dtype(xs[0].dtype),
    )
    blocks = triton.cdiv(out_channels, config.block_o) * triton.cdiv(channels, config.block_c)
    _conv3_weight_grad_kernel[(branches * config.programs * blocks,)](
        tuple(dys), tuple(xs), shares,
        images, height, width, channels, out_channels, config.rows, config.programs,
        BRANCHES=branches, RELU=relu, ACC=accumulator(xs[0].dtype), OPERAND=operand(xs[0].dtype),
        BLOCK_P=config.block_p, BLOCK_O=config.block_o, BLOCK_C=config.block_c,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return shares


def summed(shares: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """dw (B, C_out, C, 3, 3), each channels_last, from the shares of all programs.

    In their dtype, or rounded to `dtype`.
    """
    if len(shares) > 1:
        rows, columns = (64, 32) if shares[0].numel() < MANY_SUMS else (8, 256)
        total = sum_rows(shares, block_rows=rows, block_columns=columns, dtype=dtype)
    else:
        total = shares[0].to(dtype or shares.dtype)
    return total.movedim(-1, 2)

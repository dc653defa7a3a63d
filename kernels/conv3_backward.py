"""Weight gradients of dense 3x3 convolutions of NHWC maps, padding 1, stride 1.

For B convolutions of equal shapes, with g = dy and u, v in {-1, 0, 1},

    dw[b, o, u, v, c] = sum_{n, i, j} g_b[n, i, j - v, o] x_b[n, i + u, j, c]

where what lies outside the maps is zero. The left operands are the same for every u, the right
ones for every v, and the next row of positions needs only one new row of x. A program holds all
nine sums of a block of channels while it walks down columns of the maps; it sums its share of the
positions, `summed` adds the shares in a fixed order.

Least traffic, in elements: B M (C + C_out) for M = N H W positions. Each block of input channels
reads g again, each block of output channels x; of the three readings of g by one program two meet
in the first-level cache. Arithmetic: 9 B M C C_out multiply-adds.
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
    check_like,
    check_product,
    has_matrix_units,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.mixed_sum import check_maps

RESIDENT = 2 * 132
"""Programs of the default tile that an H200 holds at once, for their registers."""
FEWEST_ROWS = 8
"""Of a walk, so that those with which it begins do not count."""


@dataclass(frozen=True)
class WeightGradConfig:
    """Of one program: `block_p` columns of `rows` rows at a time, `block_o` by `block_c` channels;
    `programs` share the positions of a convolution."""

    block_p: int
    block_o: int
    block_c: int
    rows: int
    warps: int
    programs: int

    @classmethod
    def default(cls, branches: int, shape: Sequence[int], out_channels: int) -> WeightGradConfig:
        """As many programs as run at once; shape: of a map, (N, C, H, W)."""
        return cls.of_tile(branches, shape, out_channels, 32, 32, 32)

    @classmethod
    def of_tile(
        cls, branches: int, shape: Sequence[int], out_channels: int,
        block_p: int, block_o: int, block_c: int, warps: int = 8, resident: int = RESIDENT,
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
        return cls(block_p, block_o, block_c, rows, warps, programs)


@triton.jit
def _row(map_ptr, image, row, column, channel, H, W, C, wanted, OPERAND: tl.constexpr):
    """Columns of a row of a map, zero outside of it and where not wanted.

    column, wanted: (BLOCK_P, 1), or with an entry a channel; channel: (1, channels).
    """
    row_ptr = map_ptr + (image * H + row).to(tl.int64) * W * C
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H) & wanted
    value = tl.load(row_ptr + (column * C + channel), mask=inside & (channel < C), other=0.0)
    return value.to(OPERAND)


@triton.jit
def _store_shares(share, total, o, u, v, c, C, CO):
    """Of the taps (u, v): total is (v and o, c)."""
    entry = share + ((o * 9 + u * 3 + v) * C + c)
    tl.store(entry, total, mask=(v < 3) & (o < CO) & (c < C))


@triton.jit(do_not_specialize=["images", "rows", "programs"])
def _conv3_weight_grad_kernel(
    dy_ptrs, x_ptrs, share_ptr, images, H, W, C, CO, rows, programs,
    BRANCHES: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th walk of a convolution, for one block of channels.

    Blocks of channels of the same positions are neighbours in launch order. The left operand holds
    g three times, as v has it, and a fourth part of zeros: its size must be a power of two.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks = blocks_c * tl.cdiv(CO, BLOCK_O)
    block = tl.program_id(0) % blocks
    c = (block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    part = tl.arange(0, 4 * BLOCK_O)
    o = (block // blocks_c * BLOCK_O + part % BLOCK_O)[None, :]
    v = (part // BLOCK_O)[None, :]
    program = tl.program_id(0) // blocks % programs
    branch = tl.program_id(0) // blocks // programs
    dy_ptr, x_ptr = dy_ptrs[0], x_ptrs[0]
    for k in tl.static_range(1, BRANCHES):
        if branch == k:
            dy_ptr, x_ptr = dy_ptrs[k], x_ptrs[k]

    # By u: (v and o, c).
    above = tl.zeros((4 * BLOCK_O, BLOCK_C), dtype=ACC)
    level = tl.zeros((4 * BLOCK_O, BLOCK_C), dtype=ACC)
    below = tl.zeros((4 * BLOCK_O, BLOCK_C), dtype=ACC)
    strips, segments = tl.cdiv(W, BLOCK_P), tl.cdiv(H, rows)
    for walk in range(program, images * strips * segments, programs):
        first = walk % segments * rows
        column = (walk // segments % strips * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
        image = walk // segments // strips
        shifted = column + (1 - v)
        north = _row(x_ptr, image, first - 1, column, c, H, W, C, column < W, OPERAND)
        middle = _row(x_ptr, image, first, column, c, H, W, C, column < W, OPERAND)
        south = _row(x_ptr, image, first + 1, column, c, H, W, C, column < W, OPERAND)
        g = _row(dy_ptr, image, first, shifted, o, H, W, CO, v < 3, OPERAND)
        for step in range(1, rows + 1):
            # On their way while the products of the row before are formed.
            row, more = first + step, step < rows
            next_g = _row(dy_ptr, image, row, shifted, o, H, W, CO, (v < 3) & more, OPERAND)
            next_x = _row(x_ptr, image, row + 1, column, c, H, W, C, more, OPERAND)
            g = tl.trans(g)
            above = tl.dot(g, north, above, input_precision="ieee", out_dtype=ACC)
            level = tl.dot(g, middle, level, input_precision="ieee", out_dtype=ACC)
            below = tl.dot(g, south, below, input_precision="ieee", out_dtype=ACC)
            north, middle, south, g = middle, south, next_x, next_g

    share = share_ptr + (program * BRANCHES + branch).to(tl.int64) * CO * 9 * C
    o = (block // blocks_c * BLOCK_O + part % BLOCK_O)[:, None]
    v = (part // BLOCK_O)[:, None]
    _store_shares(share, above, o, 0, v, c, C, CO)
    _store_shares(share, level, o, 1, v, c, C, CO)
    _store_shares(share, below, o, 2, v, c, C, CO)


def fits(x: Tensor, out_channels: int) -> bool:
    """Whether `conv3_weight_grad` suits maps like x: of 16 bits, in whole blocks of channels.

    It takes others too, but 32-bit products run outside the matrix units, where libraries tile
    better.
    """
    return x.dtype.itemsize == 2 and x.shape[1] % 32 == out_channels % 32 == 0


def serves(x: Tensor, out_channels: int) -> bool:
    """Whether `conv3_weight_grad` is the way to take for maps like x on their device."""
    return fits(x, out_channels) and has_matrix_units(x)


def conv3_weight_grad(
    dys: Sequence[Tensor], xs: Sequence[Tensor], config: WeightGradConfig | None = None
) -> Tensor:
    """The shares (programs, B, C_out, 3, 3, C) of dw, in the accumulator's dtype, for `summed`.

    dys: the gradients of B convolutions, (N, C_out, H, W); xs: their maps, (N, C, H, W); all
    channels_last, of one dtype. float64 is for the interpreter only. Raises `ValueError` naming the
    argument at fault.
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
        BRANCHES=branches, ACC=accumulator(xs[0].dtype), OPERAND=operand(xs[0].dtype),
        BLOCK_P=config.block_p, BLOCK_O=config.block_o, BLOCK_C=config.block_c,
        num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return shares


def summed(shares: Tensor) -> Tensor:
    """dw (B, C_out, C, 3, 3), each channels_last, from the shares of all programs."""
    if len(shares) > 1:
        rows = min(256, triton.next_power_of_2(len(shares)))
        total = sum_rows(shares, block_rows=rows, block_columns=min(128, 2048 // rows))
    else:
        total = shares[0]
    return total.movedim(-1, 2)

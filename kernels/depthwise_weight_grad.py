"""Weight gradient of the depthwise branches, in two stages and hence in a fixed order.

    dw[e, b, u, v, c] = sum_{n, i, j} r(x[n, s i + u d_b, s j + v d_b, c]) dy[e, b, n, i, j, c]

The programs walk the same chains as the forward kernel: the three horizontal taps of an input
row, loaded once, meet the dy of the up to three outputs that they served. A program adds up many
tiles before it writes its share of dw; `sum_rows` adds the shares. Each map of dy has its own
programs, since nine sums a channel are all that the registers hold; the maps are neighbours in
launch order, so that they find x in the L2 cache.

Least traffic, in maps of y: s^2 + E B. Arithmetic: 9 E B multiply-adds an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, accumulator_dtype, sum_rows
from lgcnet_fast.kernels.depthwise import (
    check_arguments,
    check_dy,
    default_rows,
    dilation_of,
    load_taps,
    locate_chains,
    pack,
    pieces_of,
)


@dataclass(frozen=True)
class WeightGradConfig:
    """Tile: `block_p` chains of `rows` outputs, `block_c` channels; `programs` to a map of dy."""

    rows: int
    block_p: int
    block_c: int
    warps: int
    programs: int

    @classmethod
    def default(
        cls, dy_shape: tuple[int, ...], dilations: Sequence[int], stride: int
    ) -> WeightGradConfig:
        """8 bytes of 16-bit storage a thread and load; 4 programs for each of 132 cores."""
        edges, branches, images, channels, height, width = dy_shape
        block_c = min(64, triton.next_power_of_2(channels))
        block_p = 512 // block_c
        rows = default_rows(height, width, dilations, stride)
        tiles = triton.cdiv(images * width * triton.cdiv(height, rows), block_p)
        others = edges * branches * triton.cdiv(channels, block_c)
        return cls(rows, block_p, block_c, warps=4, programs=min(tiles, max(528 // others, 1)))


@triton.jit
def add_products(total, taps, g):
    return total[0] + taps[0] * g, total[1] + taps[1] * g, total[2] + taps[2] * g


@triton.jit
def _walk_chains(
    top, centre, bottom, x, dy, mask, in_row, in_column, out_row, dilation, step,
    H, W, HO, WO, C,
    HOP: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The three window rows of dw, each (left, middle, right), with a tile of chains added.

    Input row u is the bottom row of output (u - 2) / HOP, the centre row of (u - 1) / HOP and the
    top row of u / HOP, where these are whole and among the ROWS outputs.
    """
    tap = dilation * C
    x_pitch = (dilation * W).to(tl.int64) * C
    y_pitch = (step * WO).to(tl.int64) * C
    left = in_column >= dilation
    right = in_column + dilation < W
    last_top: tl.constexpr = HOP * (ROWS - 1)
    g_one_ago, g_two_ago = 0.0, 0.0
    for u in tl.static_range(last_top + 3):
        inside = mask & (in_row >= 0) & (in_row < H)
        taps = load_taps(x, tap, inside & left, inside, inside & right, RELU, ACC)
        if u >= 2 and u % HOP == 0:
            bottom = add_products(bottom, taps, g_two_ago)
        g_two_ago = g_one_ago
        if u % HOP == 1 % HOP and (u >= 1 and u <= last_top + 1):
            centre = add_products(centre, taps, g_one_ago)
        if u % HOP == 0 and u <= last_top:
            g_one_ago = tl.load(dy, mask=mask & (out_row < HO), other=0.0).to(ACC)
            top = add_products(top, taps, g_one_ago)
            dy += y_pitch
            out_row += step
        x += x_pitch
        in_row += dilation
    return top, centre, bottom


@triton.jit
def _add_tile(
    top, centre, bottom, x_ptr, dy_ptr, position, channel, dilation, N, H, W, HO, WO, C,
    STRIDE: tl.constexpr, HOP: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The three window rows of dw with the chains `position` added."""
    step, image, row, column = locate_chains(position, dilation, HO, WO, STRIDE, ROWS)
    in_row = STRIDE * row - dilation
    in_column = STRIDE * column
    x = x_ptr + ((image * H + in_row) * W + in_column) * C + channel
    dy = dy_ptr + ((image * HO + row) * WO + column) * C + channel
    mask = (image < N) & (channel < C)
    return _walk_chains(
        top, centre, bottom, x, dy, mask, in_row, in_column, row, dilation, step, H, W, HO, WO, C,
        HOP, ROWS, RELU, ACC,
    )  # fmt: skip


@triton.jit
def store_window_row(share, row, channel_mask, C, WINDOW_ROW: tl.constexpr):
    """Sums a window row of dw over the positions of the tile and writes it."""
    for tap in tl.static_range(3):
        total = tl.sum(row[tap], axis=0)[None, :]
        tl.store(share + (3 * WINDOW_ROW + tap) * C, total, mask=channel_mask)


@triton.jit(do_not_specialize=["packed_dilations", "N", "maps", "branches", "programs"])
def _weight_grad_kernel(
    dy_ptr, x_ptr, share_ptr, packed_dilations, N, H, W, HO, WO, C, maps, branches, programs,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th tile of chains of one map of dy, BLOCK_C channels."""
    k = tl.program_id(0) % maps
    rest = tl.program_id(0) // maps
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (rest % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    program = rest // channel_blocks
    lane = tl.arange(0, BLOCK_P)[:, None]

    dilation = dilation_of(packed_dilations, k % branches)
    chains = N * WO * pieces_of(dilation, HO, STRIDE, ROWS)
    dy_ptr += k.to(tl.int64) * N * HO * WO * C
    zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    top, centre, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    if STRIDE == 1 or dilation % STRIDE == 0:
        for first in range(program * BLOCK_P, chains, programs * BLOCK_P):
            top, centre, bottom = _add_tile(
                top, centre, bottom, x_ptr, dy_ptr, first + lane, channel, dilation,
                N, H, W, HO, WO, C, STRIDE, 1, ROWS, RELU, ACC,
            )  # fmt: skip
    else:
        for first in range(program * BLOCK_P, chains, programs * BLOCK_P):
            top, centre, bottom = _add_tile(
                top, centre, bottom, x_ptr, dy_ptr, first + lane, channel, dilation,
                N, H, W, HO, WO, C, STRIDE, 2, ROWS, RELU, ACC,
            )  # fmt: skip

    share = share_ptr + (program * maps + k).to(tl.int64) * 9 * C + channel
    store_window_row(share, top, channel < C, C, 0)
    store_window_row(share, centre, channel < C, C, 1)
    store_window_row(share, bottom, channel < C, C, 2)


def depthwise_multi_weight_grad(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    dilations: Sequence[int],
    stride: int = 1,
    relu: bool = False,
    config: WeightGradConfig | None = None,
) -> Tensor:
    """dw of `depthwise_multi`: (edges, branches, 3, 3, C) in the accumulator's dtype.

    dy: (edges, branches, N, C, ceil(H / stride), ceil(W / stride)), dense channels_last maps one
    after the other, of x's dtype; of `weights` only the shape counts; the others as in
    `depthwise_multi`. Raises `ValueError` naming the argument at fault.
    """
    edges, branches, channels = check_arguments(x, weights, dilations, stride)
    images, _, height, width = x.shape
    out_height, out_width = check_dy(dy, x, weights, stride)
    config = config or WeightGradConfig.default(tuple(dy.shape), dilations, stride)
    shares = x.new_empty(config.programs, *weights.shape, dtype=accumulator_dtype(x.dtype))
    blocks = config.programs * triton.cdiv(channels, config.block_c) * edges * branches
    _weight_grad_kernel[(blocks,)](
        dy, x, shares, pack(dilations), images, height, width, out_height, out_width, channels,
        edges * branches, branches, config.programs,
        STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype),
        ROWS=config.rows, BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return sum_rows(shares)


def depthwise_weight_grad(
    dy: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, stride: int = 1, relu: bool = False
) -> Tensor:
    """One branch: dy as the output of `depthwise`; dw (3, 3, C) in the accumulator's dtype."""
    return depthwise_multi_weight_grad(
        dy[None, None], x, weight[None, None], (dilation,), stride, relu
    )[0, 0]

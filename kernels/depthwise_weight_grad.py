"""Weight gradient of the depthwise branches, in two stages and hence in a fixed order.

    dw[e, b, u, v, c] = sum_{n, i, j} r(x[n, s i + u d_b, s j + v d_b, c]) dy[e, b, n, i, j, c]

The programs walk the same chains as the forward kernel: the three horizontal taps of an input
row, loaded once, meet the dy of the up to three outputs that they served. A program adds up whole
lines of chains before it writes its share of dw; `sum_rows` adds the shares. Each map of dy has
its own programs, since nine sums a channel are all that the registers hold; the maps are
neighbours in launch order, so that they find x in the L2 cache.

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
    AHEAD,
    check_arguments,
    check_dy,
    default_block,
    default_rows,
    dilation_of,
    load_taps,
    locate_chains,
    pack,
    pieces_of,
    ready,
    widen,
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
        """8 bytes of 16-bit storage a thread and load; 4 programs for each of 132 cores.

        A single map, whose `depthwise_backward` holds more, has half of the tile and 3 programs.
        """
        edges, branches, images, channels, height, width = dy_shape
        single = edges * branches == 1
        block_p, block_c = default_block(256 if single else 512, width, channels)
        rows = max(default_rows(height, width, dilations, stride) // stride, 1)
        tiles = images * triton.cdiv(height, rows) * triton.cdiv(width, block_p)
        others = edges * branches * triton.cdiv(channels, block_c)
        programs = min(tiles, max((396 if single else 528) // others, 1))
        return cls(rows, block_p, block_c, warps=4, programs=programs)

    def share_out(self, lines: int, width: int) -> tuple[int, int]:
        """(programs, segments): into how many segments the programs must divide `lines` lines."""
        segments = min(max(self.programs // lines, 1), triton.cdiv(width, self.block_p))
        return self.programs // segments * segments, segments


@triton.jit
def add_products(total, taps, g):
    return total[0] + taps[0] * g, total[1] + taps[1] * g, total[2] + taps[2] * g


@triton.jit
def load_link(x, u: tl.constexpr, offset, row, step, mask, HO, WO, C):
    """Row u of a chain, `step` rows apart, of a map with HO x WO pixels; x: its first, `row`."""
    x += u * (step * WO).to(tl.int64) * C
    return tl.load(x + offset, mask=mask & (row + u * step < HO), other=0.0)


@triton.jit
def _add_tile(
    top, centre, bottom, x, dy, in_row, row, first, lane, channel, dilation, step, H, W, HO, WO, C,
    STRIDE: tl.constexpr, HOP: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The three window rows of dw, each (left, middle, right), with a tile of chains added.

    x and dy point at column `first` of the rows `in_row` and `row`: pointers that change with the
    tile, else the compiler keeps one for every tap in registers. Input row u is the bottom row of
    output (u - 2) / HOP, the centre row of (u - 1) / HOP and the top row of u / HOP, where these
    are whole and among the ROWS outputs.
    """
    last_top: tl.constexpr = HOP * (ROWS - 1)
    column = first + lane
    mask = (column < WO) & (channel < C)
    in_column = STRIDE * column
    x_offset, offset = STRIDE * lane * C + channel, lane * C + channel
    rows, outputs = (), ()
    for u in tl.static_range(AHEAD):
        rows = rows + (load_taps(x, u, x_offset, in_row, in_column, dilation, mask, H, W, C),)
        if u % HOP == 0 and u <= last_top:
            outputs = outputs + (load_link(dy, u // HOP, offset, row, step, mask, HO, WO, C),)
    g_one_ago, g_two_ago = 0.0, 0.0
    for u in tl.static_range(last_top + 3):
        if u + AHEAD < last_top + 3:
            rows = rows + (
                load_taps(x, u + AHEAD, x_offset, in_row, in_column, dilation, mask, H, W, C),
            )
        if (u + AHEAD) % HOP == 0 and u + AHEAD <= last_top:
            outputs = outputs + (
                load_link(dy, (u + AHEAD) // HOP, offset, row, step, mask, HO, WO, C),
            )
        taps = ready(rows[u], RELU, ACC)
        if u >= 2 and u % HOP == 0:
            bottom = add_products(bottom, taps, g_two_ago)
        g_two_ago = g_one_ago
        if u % HOP == 1 % HOP and (u >= 1 and u <= last_top + 1):
            centre = add_products(centre, taps, g_one_ago)
        if u % HOP == 0 and u <= last_top:
            g_one_ago = widen(outputs[u // HOP], ACC)
            top = add_products(top, taps, g_one_ago)
    return top, centre, bottom


@triton.jit
def _add_line(
    top, centre, bottom, x, dy, in_row, row, channel, dilation, step, H, W, HO, WO, C,
    segment, segments,
    STRIDE: tl.constexpr, HOP: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The three window rows of dw with a segment of the chains that start in one row added."""
    lane = tl.arange(0, BLOCK_P)[:, None]
    for first in range(segment * BLOCK_P, WO, segments * BLOCK_P):
        top, centre, bottom = _add_tile(
            top, centre, bottom, x + STRIDE * first * C, dy + first * C, in_row, row, first, lane,
            channel, dilation, step, H, W, HO, WO, C, STRIDE, HOP, ROWS, RELU, ACC,
        )  # fmt: skip
    return top, centre, bottom


@triton.jit
def store_window_row(share, row, channel_mask, C, WINDOW_ROW: tl.constexpr):
    """Sums a window row of dw over the positions of the tile and writes it."""
    for tap in tl.static_range(3):
        total = tl.sum(row[tap], axis=0)[None, :]
        tl.store(share + (3 * WINDOW_ROW + tap) * C, total, mask=channel_mask)


@triton.jit(do_not_specialize=["packed_dilations", "N", "maps", "branches", "programs", "segments"])
def _weight_grad_kernel(
    dy_ptr, x_ptr, share_ptr, packed_dilations, N, H, W, HO, WO, C, maps, branches, programs,
    segments,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a segment of some of the lines of one map of dy, BLOCK_C channels.

    A line is the chains of all columns that start in one row; its segment is every `segments`-th
    tile of them.
    """
    k = tl.program_id(0) % maps
    rest = tl.program_id(0) // maps
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (rest % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    program = rest // channel_blocks

    dilation = dilation_of(packed_dilations, k % branches)
    pieces = pieces_of(dilation, HO, STRIDE, ROWS)
    dy_ptr += k.to(tl.int64) * N * HO * WO * C
    zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    top, centre, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    for line in range(program // segments, N * pieces, programs // segments):
        step, row = locate_chains(line % pieces, dilation, HO, STRIDE, ROWS)
        image = (line // pieces).to(tl.int64)
        in_row = STRIDE * row - dilation
        x = x_ptr + (image * H + in_row) * W * C
        dy = dy_ptr + (image * HO + row) * WO * C
        if STRIDE == 1 or dilation % STRIDE == 0:
            top, centre, bottom = _add_line(
                top, centre, bottom, x, dy, in_row, row, channel, dilation, step,
                H, W, HO, WO, C, program % segments, segments, STRIDE, 1, ROWS, RELU, ACC, BLOCK_P,
            )  # fmt: skip
        else:
            top, centre, bottom = _add_line(
                top, centre, bottom, x, dy, in_row, row, channel, dilation, step,
                H, W, HO, WO, C, program % segments, segments, STRIDE, 2, ROWS, RELU, ACC, BLOCK_P,
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
    lines = images * triton.cdiv(out_height, config.rows)
    programs, segments = config.share_out(lines, out_width)
    shares = x.new_empty(programs, *weights.shape, dtype=accumulator_dtype(x.dtype))
    blocks = programs * triton.cdiv(channels, config.block_c) * edges * branches
    _weight_grad_kernel[(blocks,)](
        dy, x, shares, pack(dilations), images, height, width, out_height, out_width, channels,
        edges * branches, branches, programs, segments,
        STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype),
        ROWS=config.rows, BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
        maxnreg=200 if x.element_size() == 2 else None,  # a hint: without it more are taken
    )  # fmt: skip
    return sum_rows(shares)


def depthwise_weight_grad(
    dy: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, stride: int = 1, relu: bool = False
) -> Tensor:
    """One branch: dy as the output of `depthwise`; dw (3, 3, C) in the accumulator's dtype."""
    return depthwise_multi_weight_grad(
        dy[None, None], x, weight[None, None], (dilation,), stride, relu
    )[0, 0]

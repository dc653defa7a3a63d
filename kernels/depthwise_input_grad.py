"""Input gradient of the depthwise branches: all edges and branches summed in one pass.

With g = dy[e, b], for stride 1

    dx[n, p, q, c] = m sum_{e, b, u, v} w[e, b, u, v, c] g[n, p - u d_b, q - v d_b, c]
                     + sum_k others_k[n, p, q, c]

where m = [x > 0] under a ReLU, else 1. One program sums a tile of dx over all maps of dy. The
others are gradients of x that come from elsewhere.

With stride 2 a tile position (i, j) stands for the 2 x 2 input positions (2 i, 2 j) and on. A tap
u of an even dilation reaches only even rows, from output row i - u d / 2; of an odd dilation,
u = 0 reaches the even row from i, and u = -1 or 1 the odd row from i + (1 - u d) / 2. So each tap
belongs to exactly one of the four positions, and none is computed in vain.

How the kernel saves work: a tile is ROWS rows high, and a thread holds all rows of its column. For
one v it goes down a column of dy, loads and widens each value once, and gives it to all rows of dx
that need it: up to three where the reach of the window (d / s) is less than ROWS. The row is the
same for a whole program, so that only columns have masks of their own.

Least traffic, in maps of y: E B + (2 + K) s^2 with a ReLU and K others, E B + (1 + K) s^2 without a
ReLU. Arithmetic: 9 E B multiply-adds an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, empty_map
from lgcnet_fast.kernels.depthwise import default_block, dilation_of
from lgcnet_fast.kernels.depthwise_arguments import Maps, check_arguments, check_dy, pack
from lgcnet_fast.kernels.launches import INTERPRETED, kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.slabs import pointer_of

_INTERPRETED = tl.constexpr(INTERPRETED)
ROWS_AT_ONCE = tl.constexpr(4)
"""Rows of dx for which a thread loads x and the others before it stores any: the registers that the
window leaves."""


@dataclass(frozen=True)
class InputGradConfig:
    """Tile of one program: `rows` x `block_p` positions of dy, `block_c` channels."""

    rows: int
    block_p: int
    block_c: int
    warps: int

    @classmethod
    def default(cls, dy_shape: tuple[int, ...], stride: int) -> InputGradConfig:
        """Large maps: 8 rows and 16 bytes a thread and load of 16-bit storage; others 4 rows and 8.

        Stride 2 holds four tiles of dx, which is what the registers take at two rows.
        """
        *_, images, channels, height, width = dy_shape
        block_p, block_c = default_block(512, channels, widest=32, spare=1 / 8)
        elements = images * channels * height * width
        rows = 8 if elements >= 1_500_000 else 4 if elements >= 375_000 else 2
        rows = 2 if stride == 2 else min(rows, max(2, triton.next_power_of_2(height)))
        return cls(rows, block_p, block_c, warps=2 if rows == 8 else 4)


@triton.jit
def _widen(x, ACC: tl.constexpr):
    """x in the accumulator's dtype; two values of bfloat16 by two instructions."""
    if not _INTERPRETED:
        if x.dtype == tl.bfloat16:
            bits = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=&r,r", [x],
                dtype=tl.int32, is_pure=True, pack=2,
            )  # fmt: skip
            x = bits.to(tl.float32, bitcast=True)
    return x.to(ACC)


@triton.jit
def _anew(row):
    """row, of which the compiler cannot tell that it is the same in every turn of a loop.

    Else it computes the addresses of all rows and windows ahead of the loop, and then the
    registers do not hold them.
    """
    if not _INTERPRETED:
        row = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [row], dtype=tl.int32, is_pure=False, pack=1
        )
    return row


@triton.jit
def _load_row(g, row, inside, HO, ACC: tl.constexpr):
    """A row of dy at the pointers g, zero outside."""
    # One comparison for both ends: a negative row is a large unsigned number.
    within = tl.cast(row, tl.uint32) < tl.cast(HO, tl.uint32)
    return _widen(tl.load(g, mask=inside & within, other=0.0), ACC)


@triton.jit
def _load_weights(w, channel_mask, C, ACC: tl.constexpr):
    """A column of the window: the weights of the taps u = -1, 0 and 1, which is bottom up."""
    low = tl.load(w, mask=channel_mask, other=0.0).to(ACC)
    centre = tl.load(w + 3 * C, mask=channel_mask, other=0.0).to(ACC)
    high = tl.load(w + 6 * C, mask=channel_mask, other=0.0).to(ACC)
    return low, centre, high


@triton.jit
def _add_column(
    sums, g, w, across, row, column, mask, channel_mask, reach, HO, WO, C,
    ROWS: tl.constexpr, REACH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The rows of dx with one column of the window added.

    g points at row `row`, `across` columns from `column`. REACH is `reach` where a row of dy
    serves several of the ROWS, else 0.
    """
    low, centre, high = _load_weights(w, channel_mask, C, ACC)
    inside = mask & (column + across >= 0) & (column + across < WO)
    pitch = tl.cast(WO, tl.int64) * C
    above = g - reach * pitch
    added = ()
    if REACH:
        rows = ()
        for r in tl.static_range(ROWS + 2 * REACH):
            rows = rows + (_load_row(above, row + (r - REACH), inside, HO, ACC),)
            above += pitch
            if r >= 2 * REACH:
                total = sums[r - 2 * REACH] + high * rows[r - 2 * REACH]
                added = added + (total + centre * rows[r - REACH] + low * rows[r],)
    else:
        below = g + reach * pitch
        for r in tl.static_range(ROWS):
            g_above = _load_row(above, row + r - reach, inside, HO, ACC)
            g_here = _load_row(g, row + r, inside, HO, ACC)
            g_below = _load_row(below, row + r + reach, inside, HO, ACC)
            above += pitch
            g += pitch
            below += pitch
            added = added + (sums[r] + high * g_above + centre * g_here + low * g_below,)
    return added


@triton.jit
def _add_reach(
    sums, g, w, reach, row, column, channel, mask, channel_mask, HO, WO, C,
    ROWS: tl.constexpr, REACH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All nine taps, `reach` positions apart, when they belong to one input position."""
    for v in range(3):
        again = _anew(row)
        across = (1 - v) * reach
        at = g + again * (tl.cast(WO, tl.int64) * C) + ((column + across) * C + channel)
        sums = _add_column(
            sums, at, w + v * C + channel, across, again, column, mask, channel_mask, reach,
            HO, WO, C, ROWS, REACH, ACC,
        )  # fmt: skip
    return sums


@triton.jit
def _add_window(
    sums, g, w, reach, row, column, channel, mask, channel_mask, HO, WO, C,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_add_reach` for any reach."""
    if (reach == 1) & (ROWS > 1):
        sums = _add_reach(
            sums, g, w, 1, row, column, channel, mask, channel_mask, HO, WO, C, ROWS, 1, ACC
        )
    elif (reach == 2) & (ROWS > 2):
        sums = _add_reach(
            sums, g, w, 2, row, column, channel, mask, channel_mask, HO, WO, C, ROWS, 2, ACC
        )
    elif (reach == 4) & (ROWS > 4):
        sums = _add_reach(
            sums, g, w, 4, row, column, channel, mask, channel_mask, HO, WO, C, ROWS, 4, ACC
        )
    else:
        sums = _add_reach(
            sums, g, w, reach, row, column, channel, mask, channel_mask, HO, WO, C, ROWS, 0, ACC
        )
    return sums


@triton.jit
def _add_odd_column(
    even, odd, g, w, across, row, column, channel, mask, channel_mask, up, down, HO, WO, C,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stride 2, odd dilation: the even and the odd rows of dx with a column of taps added."""
    row = _anew(row)
    pitch = tl.cast(WO, tl.int64) * C
    high, centre, low = _load_weights(w + channel, channel_mask, C, ACC)
    inside = mask & (column + across >= 0) & (column + across < WO)
    here = g + row * pitch + ((column + across) * C + channel)
    above = here + up * pitch
    below = here + down * pitch
    evens, odds = (), ()
    for r in tl.static_range(ROWS):
        evens = evens + (even[r] + centre * _load_row(here, row + r, inside, HO, ACC),)
        total = odd[r] + high * _load_row(above, row + r + up, inside, HO, ACC)
        odds = odds + (total + low * _load_row(below, row + r + down, inside, HO, ACC),)
        here += pitch
        above += pitch
        below += pitch
    return evens, odds


@triton.jit
def _add_odd_window(
    ee, eo, oe, oo, g, w, dilation, row, column, channel, mask, channel_mask, HO, WO, C,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stride 2, odd dilation: `eo` is dx of the even rows and odd columns, and so on."""
    up = (dilation + 1) // 2
    down = (1 - dilation) // 2
    eo, oo = _add_odd_column(
        eo, oo, g, w, up, row, column, channel, mask, channel_mask, up, down, HO, WO, C, ROWS, ACC
    )
    ee, oe = _add_odd_column(
        ee, oe, g, w + C, 0, row, column, channel, mask, channel_mask, up, down, HO, WO, C,
        ROWS, ACC,
    )  # fmt: skip
    eo, oo = _add_odd_column(
        eo, oo, g, w + 2 * C, down, row, column, channel, mask, channel_mask, up, down, HO, WO, C,
        ROWS, ACC,
    )  # fmt: skip
    return ee, eo, oe, oo


@triton.jit
def _store(
    x, dx, other_ptrs, of_image, sums, row, column, channel, mask, H, W, C,
    STRIDE: tl.constexpr, RELU: tl.constexpr, OTHERS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Writes ROWS rows of dx, STRIDE apart: masked by the ReLU, the others added.

    x and dx point at the image, the others at the first one.
    """
    offset = column * C + channel
    for first in tl.static_range(0, ROWS, ROWS_AT_ONCE):
        rows = ()
        # Their loads come before their stores, past which the compiler moves none.
        for r in tl.static_range(ROWS_AT_ONCE):
            if first + r < ROWS:
                start = (row + STRIDE * (first + r)).to(tl.int64) * W * C
                inside = mask & (row + STRIDE * (first + r) < H) & (column < W)
                value = sums[first + r]
                if RELU:
                    # Where x is NaN the gradient passes, as PyTorch's does.
                    dead = tl.load(x + start + offset, mask=inside, other=0.0) <= 0.0
                    value = tl.where(dead, 0.0, value)
                for k in tl.static_range(OTHERS):
                    other = other_ptrs[k] + (of_image + start) + offset
                    value += _widen(tl.load(other, mask=inside, other=0.0), ACC)
                rows = rows + (value,)
        for r in tl.static_range(ROWS_AT_ONCE):
            if first + r < ROWS:
                start = (row + STRIDE * (first + r)).to(tl.int64) * W * C
                inside = mask & (row + STRIDE * (first + r) < H) & (column < W)
                tl.store(dx + start + offset, rows[r], mask=inside)


@triton.jit
def _zeros(ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """ROWS tiles of zeros."""
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC),)
    return rows


@kernel(do_not_specialize=["packed_dilations", "N", "maps", "branches"])
def _input_grad_kernel(
    dy_ptrs, x_ptr, w_ptr, other_ptrs, dx_ptr, packed_dilations, N, H, W, HO, WO, C, maps, branches,
    APART: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, OTHERS: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x BLOCK_P output positions, BLOCK_C channels, all maps of dy.

    APART: the number of maps where each has a pointer of its own, 1 where they follow each other.
    OTHERS: how many of `other_ptrs` are added.
    """
    wait_for_predecessor()
    channel_blocks = tl.cdiv(C, BLOCK_C)
    column_blocks = tl.cdiv(WO, BLOCK_P)
    row_blocks = tl.cdiv(HO, ROWS)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tile = tl.program_id(0) // channel_blocks
    column = (tile % column_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    row = tile // column_blocks % row_blocks * ROWS
    image = (tile // column_blocks // row_blocks).to(tl.int64)
    channel_mask = channel < C
    mask = channel_mask & (column < WO)

    of_image = image * H * W * C
    x = x_ptr + of_image
    dx = dx_ptr + of_image
    of_y = image * HO * WO * C
    g = dy_ptrs[0] + of_y
    w = w_ptr
    y_size = N.to(tl.int64) * HO * WO * C
    ee = _zeros(ROWS, BLOCK_P, BLOCK_C, ACC)
    if STRIDE == 1:
        for k in range(maps):
            if APART > 1:
                g = pointer_of(dy_ptrs, k, APART) + of_y
            reach = dilation_of(packed_dilations, k % branches)
            ee = _add_window(
                ee, g, w, reach, row, column, channel, mask, channel_mask, HO, WO, C, ROWS, ACC
            )
            if APART == 1:
                g += y_size
            w += 9 * C
    else:
        eo = _zeros(ROWS, BLOCK_P, BLOCK_C, ACC)
        oe = _zeros(ROWS, BLOCK_P, BLOCK_C, ACC)
        oo = _zeros(ROWS, BLOCK_P, BLOCK_C, ACC)
        for k in range(maps):
            if APART > 1:
                g = pointer_of(dy_ptrs, k, APART) + of_y
            dilation = dilation_of(packed_dilations, k % branches)
            if dilation % 2 == 0:
                ee = _add_window(
                    ee, g, w, dilation // 2, row, column, channel, mask, channel_mask,
                    HO, WO, C, ROWS, ACC,
                )  # fmt: skip
            else:
                ee, eo, oe, oo = _add_odd_window(
                    ee, eo, oe, oo, g, w, dilation, row, column, channel, mask, channel_mask,
                    HO, WO, C, ROWS, ACC,
                )  # fmt: skip
            if APART == 1:
                g += y_size
            w += 9 * C
        tops, lefts = 2 * row, 2 * column
        _store(
            x, dx, other_ptrs, of_image, eo, tops, lefts + 1, channel, mask, H, W, C,
            2, RELU, OTHERS, ACC, ROWS,
        )  # fmt: skip
        _store(
            x, dx, other_ptrs, of_image, oe, tops + 1, lefts, channel, mask, H, W, C,
            2, RELU, OTHERS, ACC, ROWS,
        )  # fmt: skip
        _store(
            x, dx, other_ptrs, of_image, oo, tops + 1, lefts + 1, channel, mask, H, W, C,
            2, RELU, OTHERS, ACC, ROWS,
        )  # fmt: skip
    _store(
        x, dx, other_ptrs, of_image, ee, STRIDE * row, STRIDE * column, channel, mask, H, W, C,
        STRIDE, RELU, OTHERS, ACC, ROWS,
    )  # fmt: skip


def depthwise_multi_input_grad(
    dy: Maps,
    x: Tensor,
    weights: Tensor,
    dilations: Sequence[int],
    stride: int = 1,
    relu: bool = False,
    config: InputGradConfig | None = None,
    others: Sequence[Tensor] = (),
) -> Tensor:
    """dx of `depthwise_multi`, like x: the sum over all edges and branches, and of `others`.

    dy: (edges, branches, N, C, ceil(H / stride), ceil(W / stride)), dense channels_last maps one
    after the other, of x's dtype, or all the maps apart, edge after edge; others: gradients of x,
    like x; x to relu as in `depthwise_multi`. Rounded once, from the accumulator's dtype. Raises
    `ValueError` naming the argument at fault.
    """
    edges, branches, channels = check_arguments(x, weights, dilations, stride)
    images, _, height, width = x.shape
    dys, (out_height, out_width) = check_dy(dy, x, weights, stride)
    check_maps("others", others, x)
    config = config or InputGradConfig.default(tuple(dys[0].shape), stride)
    tiles = images * triton.cdiv(out_height, config.rows) * triton.cdiv(out_width, config.block_p)
    dx = empty_map(tuple(x.shape), x)
    _input_grad_kernel[(tiles * triton.cdiv(channels, config.block_c),)](
        dys, x, weights, tuple(others) or (x,), dx, pack(dilations),
        images, height, width, out_height, out_width, channels, edges * branches, branches,
        APART=len(dys), STRIDE=stride, RELU=relu, OTHERS=len(others), ACC=accumulator(x.dtype),
        ROWS=config.rows, BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return dx


def depthwise_input_grad(
    dy: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, stride: int = 1, relu: bool = False
) -> Tensor:
    """One branch: dy as the output of `depthwise`, weight (3, 3, C); dx like x."""
    return depthwise_multi_input_grad(
        dy[None, None], x, weight[None, None], (dilation,), stride, relu
    )

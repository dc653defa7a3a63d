"""Both gradients of a single depthwise branch of stride 2 and dilation 1 in one pass.

With g = dy, an output position (i, j) stands for four of x and dx. Each of the nine taps meets
exactly one of them, and both gradients multiply the same pairs:

    x[2 i, 2 j]          g[i, j]                                      w[ 0,  0]
    x[2 i, 2 j + 1]      g[i, j], g[i, j + 1]                         w[ 0,  1], w[ 0, -1]
    x[2 i + 1, 2 j]      g[i, j], g[i + 1, j]                         w[ 1,  0], w[-1,  0]
    x[2 i + 1, 2 j + 1]  g[i, j], g[i, j + 1], g[i + 1, j], g[i + 1, j + 1]
                                                  w[ 1,  1], w[ 1, -1], w[-1,  1], w[-1, -1]

A program walks down ROWS rows of outputs: two columns of a row of g, loaded once, serve two pairs
of rows of x and of dx.

Least traffic, in maps of y: 9. Arithmetic: 18 multiply-adds an output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lgcnet_fast.kernels.depthwise import load_weight_row, ready, within
from lgcnet_fast.kernels.depthwise_weight_grad import _store_share
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor


@triton.jit
def _load_walk(
    dy, x, mask, right, beside, offset, x_offset, row, H, W, HO, WO, C, ROWS: tl.constexpr
):
    """What a walk reads, as stored: ROWS + 1 rows of dy, each (here, right), and ROWS times four
    of x: (even row, even column), (even, odd), (odd, even), (odd, odd).

    right, beside: masks of the columns of dy and of x that have one to their right.
    """
    dy += (row * WO).to(tl.int64) * C
    x += (2 * row * W).to(tl.int64) * C
    g_rows, x_rows = (), ()
    for v in tl.static_range(ROWS + 1):
        here = within(row + v, HO)
        at = dy + offset
        g_here = tl.load(at, mask=mask & here, other=0.0)
        g_right = tl.load(at + C, mask=right & here, other=0.0)
        g_rows = g_rows + ((g_here, g_right),)
        dy += WO * C
        if v < ROWS:
            below = within(2 * (row + v) + 1, H)
            even = x + x_offset
            odd = even + W * C
            four = (
                tl.load(even, mask=mask & here, other=0.0),
                tl.load(even + C, mask=beside & here, other=0.0),
                tl.load(odd, mask=mask & below, other=0.0),
                tl.load(odd + C, mask=beside & below, other=0.0),
            )
            x_rows = x_rows + (four,)
            x += 2 * W * C
    return g_rows, x_rows


@triton.jit
def _gate(value, x, RELU: tl.constexpr):
    """dx of one position; where x is NaN the gradient passes, as PyTorch's does."""
    return tl.where(x <= 0.0, 0.0, value) if RELU else value


@triton.jit
def _widened(pair, ACC: tl.constexpr):
    return ready(pair[0], False, ACC), ready(pair[1], False, ACC)


@triton.jit
def _walk(
    top, centre, bottom, w_top, w_centre, w_bottom, dy, x, dx, mask, column, channel, row,
    H, W, HO, WO, C, ROWS: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes dx of ROWS rows of outputs, from `row` on; returns the window rows of dw, added to.

    dy, x and dx point at the image. All loads come before the first store, which they could not
    overtake.
    """
    offset = column * C + channel
    x_offset = 2 * column * C + channel
    right = mask & (column + 1 < WO)
    beside = mask & (2 * column + 1 < W)
    g_rows, x_rows = _load_walk(
        dy, x, mask, right, beside, offset, x_offset, row, H, W, HO, WO, C, ROWS
    )
    dx += (2 * row * W).to(tl.int64) * C
    g, g_right = _widened(g_rows[0], ACC)
    for v in tl.static_range(ROWS):
        g_below, g_across = _widened(g_rows[v + 1], ACC)
        here = within(row + v, HO)
        below = within(2 * (row + v) + 1, H)
        even, odd = dx + x_offset, dx + W * C + x_offset

        x_at = ready(x_rows[v][0], RELU, ACC)
        centre = (centre[0], centre[1] + x_at * g, centre[2])
        tl.store(even, _gate(w_centre[1] * g, x_at, RELU), mask=mask & here)

        x_at = ready(x_rows[v][1], RELU, ACC)
        centre = (centre[0] + x_at * g_right, centre[1], centre[2] + x_at * g)
        value = w_centre[0] * g_right + w_centre[2] * g
        tl.store(even + C, _gate(value, x_at, RELU), mask=beside & here)

        x_at = ready(x_rows[v][2], RELU, ACC)
        top = (top[0], top[1] + x_at * g_below, top[2])
        bottom = (bottom[0], bottom[1] + x_at * g, bottom[2])
        value = w_top[1] * g_below + w_bottom[1] * g
        tl.store(odd, _gate(value, x_at, RELU), mask=mask & below)

        x_at = ready(x_rows[v][3], RELU, ACC)
        top = (top[0] + x_at * g_across, top[1], top[2] + x_at * g_below)
        bottom = (bottom[0] + x_at * g_right, bottom[1], bottom[2] + x_at * g)
        value = w_top[0] * g_across + w_top[2] * g_below + w_bottom[0] * g_right + w_bottom[2] * g
        tl.store(odd + C, _gate(value, x_at, RELU), mask=beside & below)

        g, g_right = g_below, g_across
        dx += 2 * W * C
    return top, centre, bottom


@kernel(do_not_specialize=["N", "programs"])
def _both_gradients_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, share_ptr, N, H, W, HO, WO, C, programs,
    RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th walk, of ROWS rows and BLOCK_P columns; BLOCK_C channels."""
    wait_for_predecessor()
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    program = tl.program_id(0) // channel_blocks
    channel_mask = channel < C
    w_top = load_weight_row(w_ptr + channel, 0, channel_mask, C, ACC)
    w_centre = load_weight_row(w_ptr + channel, 1, channel_mask, C, ACC)
    w_bottom = load_weight_row(w_ptr + channel, 2, channel_mask, C, ACC)

    zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    top, centre, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    column_blocks = tl.cdiv(WO, BLOCK_P)
    row_blocks = tl.cdiv(HO, ROWS)
    for walk in range(program, N * row_blocks * column_blocks, programs):
        column = walk % column_blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        row = walk // column_blocks % row_blocks * ROWS
        image = (walk // column_blocks // row_blocks).to(tl.int64)
        top, centre, bottom = _walk(
            top, centre, bottom, w_top, w_centre, w_bottom, dy_ptr + image * HO * WO * C,
            x_ptr + image * H * W * C, dx_ptr + image * H * W * C, (column < WO) & channel_mask,
            column, channel, row, H, W, HO, WO, C, ROWS, RELU, ACC,
        )  # fmt: skip

    share = share_ptr + program.to(tl.int64) * 9 * C + channel
    _store_share(share, top, centre, bottom, channel_mask, C)

"""Both gradients of a single depthwise branch in one pass, where the stride divides the dilation.

With g = dy, reach e = d / s, and an output position (i, j), whose centre is x[s i, s j],

    dx[n, s i, s j, c] = m sum_{u, v} w[u, v, c] g[n, i - u e, j - v e, c]
    dw[u, v, c] = sum_{n, i, j} r(x[n, s i, s j, c]) g[n, i - u e, j - v e, c]

with m = [x > 0] under a ReLU, else 1; with stride 2 all other dx are zero. Both need the same nine
values of g. A program walks down chains of rows e apart, as the forward kernel does: three taps
of each row of g, loaded once, serve three rows of dx and of dw.

Least traffic, in maps of y: 1 + 2 s^2. Arithmetic: 18 multiply-adds an output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, accumulator_dtype, empty_map, sum_rows
from lgcnet_fast.kernels.depthwise import (
    check_arguments,
    check_dy,
    load_taps,
    load_weight_row,
    locate_chains,
    pieces_of,
    rectify,
    window_row,
)
from lgcnet_fast.kernels.depthwise_input_grad import depthwise_input_grad
from lgcnet_fast.kernels.depthwise_weight_grad import (
    WeightGradConfig,
    add_products,
    depthwise_weight_grad,
    store_window_row,
)


@triton.jit
def _store_dx(dx, value, x, row, column, mask, H, W, C, STRIDE: tl.constexpr, RELU: tl.constexpr):
    """Writes dx of one row, and the zeros of the positions that a stride of 2 leaves out."""
    if RELU:
        # Where x is NaN the gradient passes, as PyTorch's does.
        value = tl.where(x <= 0.0, 0.0, value)
    tl.store(dx, value, mask=mask)
    if STRIDE == 2:
        zero = tl.zeros_like(value)
        right = 2 * column + 1 < W
        below = 2 * row + 1 < H
        tl.store(dx + C, zero, mask=mask & right)
        tl.store(dx + W * C, zero, mask=mask & below)
        tl.store(dx + W * C + C, zero, mask=mask & right & below)


@triton.jit
def _walk_chains(
    top, centre, bottom, w_top, w_centre, w_bottom, dy, x, dx, mask, row, column, reach,
    H, W, HO, WO, C,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes ROWS rows of dx of every chain of a tile; returns the window rows of dw, added to.

    dy points one row of the chain above `row`. Row v of the walk meets output v from below the
    window's centre (u = 1), output v - 1 at it and output v - 2 from above.
    """
    tap = reach * C
    dy_pitch = (reach * WO).to(tl.int64) * C
    x_pitch = (STRIDE * reach * W).to(tl.int64) * C
    left = column >= reach
    right = column + reach < WO
    dy_row = row - reach
    x_row = row
    x_one_ago, x_two_ago, one_row, two_rows = 0.0, 0.0, 0.0, 0.0
    for v in tl.static_range(ROWS + 2):
        inside = mask & (dy_row >= 0) & (dy_row < HO)
        g_left, g_middle, g_right = load_taps(
            dy, tap, inside & left, inside, inside & right, False, ACC
        )
        g = (g_right, g_middle, g_left)
        if v >= 2:
            top = add_products(top, g, x_two_ago)
            value = window_row(w_top, g, two_rows)
            inside = mask & (row < HO)
            _store_dx(dx, value, x_two_ago, row, column, inside, H, W, C, STRIDE, RELU)
            dx += x_pitch
            row += reach
        x_two_ago = x_one_ago
        if v >= 1 and v <= ROWS:
            centre = add_products(centre, g, x_one_ago)
            two_rows = window_row(w_centre, g, one_row)
        if v < ROWS:
            x_one_ago = rectify(tl.load(x, mask=mask & (x_row < HO), other=0.0).to(ACC), RELU)
            bottom = add_products(bottom, g, x_one_ago)
            one_row = window_row(w_bottom, g, 0.0)
            x += x_pitch
            x_row += reach
        dy += dy_pitch
        dy_row += reach
    return top, centre, bottom


@triton.jit(do_not_specialize=["dilation", "N", "programs"])
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, share_ptr, dilation, N, H, W, HO, WO, C, programs,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th tile of chains, BLOCK_C channels."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    program = tl.program_id(0) // channel_blocks
    channel_mask = channel < C
    lane = tl.arange(0, BLOCK_P)[:, None]
    w_top = load_weight_row(w_ptr + channel, 0, channel_mask, C, ACC)
    w_centre = load_weight_row(w_ptr + channel, 1, channel_mask, C, ACC)
    w_bottom = load_weight_row(w_ptr + channel, 2, channel_mask, C, ACC)

    reach = dilation // STRIDE
    zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    top, centre, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    chains = N * WO * pieces_of(dilation, HO, STRIDE, ROWS)
    for first in range(program * BLOCK_P, chains, programs * BLOCK_P):
        _, image, row, column = locate_chains(first + lane, dilation, HO, WO, STRIDE, ROWS)
        x_offset = ((image * H + STRIDE * row) * W + STRIDE * column) * C + channel
        dy = dy_ptr + ((image * HO + row - reach) * WO + column) * C + channel
        top, centre, bottom = _walk_chains(
            top, centre, bottom, w_top, w_centre, w_bottom, dy, x_ptr + x_offset,
            dx_ptr + x_offset, (image < N) & channel_mask, row, column, reach, H, W, HO, WO, C,
            STRIDE, ROWS, RELU, ACC,
        )  # fmt: skip

    share = share_ptr + program.to(tl.int64) * 9 * C + channel
    store_window_row(share, top, channel_mask, C, 0)
    store_window_row(share, centre, channel_mask, C, 1)
    store_window_row(share, bottom, channel_mask, C, 2)


def depthwise_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dilation: int = 1,
    stride: int = 1,
    relu: bool = False,
    config: WeightGradConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients of `depthwise`: dx like x, dw (3, 3, C) in the accumulator's dtype.

    dy: as the output of `depthwise`, (N, C, ceil(H / stride), ceil(W / stride)), channels_last,
    of x's dtype. `config` is for the fused kernel; an odd dilation with stride 2 takes the two
    separate ones. Raises `ValueError` naming the argument at fault.
    """
    if dilation % stride:
        arguments = (dy, x, weight, dilation, stride, relu)
        return depthwise_input_grad(*arguments), depthwise_weight_grad(*arguments)
    check_arguments(x, weight[None, None], (dilation,), stride)
    out_height, out_width = check_dy(dy[None, None], x, weight[None, None], stride)
    images, channels, height, width = x.shape
    config = config or WeightGradConfig.default((1, 1, *dy.shape), (dilation,), stride)
    dx = empty_map(tuple(x.shape), x)
    shares = x.new_empty(config.programs, *weight.shape, dtype=accumulator_dtype(x.dtype))
    _backward_kernel[(config.programs * triton.cdiv(channels, config.block_c),)](
        dy, x, weight, dx, shares, dilation, images, height, width, out_height, out_width,
        channels, config.programs,
        STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype),
        ROWS=config.rows, BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return dx, sum_rows(shares)

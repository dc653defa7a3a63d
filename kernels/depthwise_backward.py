"""Both gradients of a single depthwise branch in one pass, where the stride divides the dilation.

With g = dy, reach e = d / s, and an output position (i, j), whose centre is x[s i, s j],

    dx[n, s i, s j, c] = m sum_{u, v} w[u, v, c] g[n, i - u e, j - v e, c]
    dw[u, v, c] = sum_{n, i, j} r(x[n, s i, s j, c]) g[n, i - u e, j - v e, c]

with m = [x > 0] under a ReLU, else 1; with stride 2 all other dx are zero. Both need the same nine
values of g. A batch norm before the ReLU is for normalised_depthwise.py, whose kernel walks as this
one does: r(x) and m are those behind it, and of dx, the gradient of its output yhat, come the sums
S0 = sum dx and S1 = sum dx yhat.

A program walks down chains of rows e apart: three taps of each row of g, loaded once, serve three
rows of dx and of dw. All columns of a walk are in the same row. Stride 2 with dilation 1, launched
from here too, is in depthwise_backward_stride2.py.

Least traffic, in maps of y: 1 + 2 s^2. Arithmetic: 18 multiply-adds an output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, accumulator_dtype, empty_map, sum_rows
from lgcnet_fast.kernels.depthwise import (
    load_weight_row,
    pieces_of,
    prepared,
    ready,
    window_row,
    within,
)
from lgcnet_fast.kernels.depthwise_arguments import check_arguments, check_dy
from lgcnet_fast.kernels.depthwise_backward_stride2 import _both_gradients_kernel
from lgcnet_fast.kernels.depthwise_input_grad import depthwise_input_grad
from lgcnet_fast.kernels.depthwise_weight_grad import (
    WeightGradConfig,
    _store_share,
    add_products,
    depthwise_weight_grad,
)
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor


@triton.jit
def _store_dx(dx, value, x, row, column, mask, H, W, C, STRIDE: tl.constexpr, RELU: tl.constexpr):
    """Writes dx of one row, and the zeros of the positions that a stride of 2 leaves out.

    Returns what it has written of the row.
    """
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
    return value


@triton.jit
def _load_walk(
    dy, x, mask, column, offset, x_offset, row, reach, H, W, HO, WO, C,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """What a walk reads, as stored: ROWS + 2 rows of dy, each (right, middle, left), ROWS of x."""
    outside: tl.constexpr = float("-inf") if NORM else 0.0
    tap = reach * C
    dy_pitch = (reach * WO).to(tl.int64) * C
    x_pitch = (STRIDE * reach * W).to(tl.int64) * C
    left = mask & (column >= reach)
    right = mask & (column + reach < WO)
    dy += ((row - reach) * WO).to(tl.int64) * C
    x += (STRIDE * row * W).to(tl.int64) * C
    g_rows, x_rows = (), ()
    for v in tl.static_range(ROWS + 2):
        here = within(row + (v - 1) * reach, HO)
        at = dy + offset
        g_right = tl.load(at + tap, mask=here & right, other=0.0)
        g_middle = tl.load(at, mask=here & mask, other=0.0)
        g_left = tl.load(at - tap, mask=here & left, other=0.0)
        g_rows = g_rows + ((g_right, g_middle, g_left),)
        dy += dy_pitch
        if v < ROWS:
            here = within(row + v * reach, HO)
            x_rows = x_rows + (tl.load(x + x_offset, mask=here & mask, other=outside),)
            x += x_pitch
    return g_rows, x_rows


@triton.jit
def _walk(
    top, centre, bottom, sums, w_top, w_centre, w_bottom, norm, dy, x, dx, mask, column, channel,
    row, reach, H, W, HO, WO, C,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr, NORM: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Writes ROWS rows of dx, from `row` on; returns the window rows of dw and S0, S1, added to.

    dy, x and dx point at the image. Row v of the walk meets output v from below the window's
    centre (u = 1), output v - 1 at it and output v - 2 from above. All loads come before the first
    store, which they could not overtake.
    """
    offset = column * C + channel
    x_offset = STRIDE * column * C + channel
    g_rows, x_rows = _load_walk(
        dy, x, mask, column, offset, x_offset, row, reach, H, W, HO, WO, C, STRIDE, ROWS, NORM
    )
    dx_pitch = (STRIDE * reach * W).to(tl.int64) * C
    dx += (STRIDE * row * W).to(tl.int64) * C
    x_one_ago, x_two_ago, one_row, two_rows = 0.0, 0.0, 0.0, 0.0
    for v in tl.static_range(ROWS + 2):
        right, middle, left = g_rows[v]
        g = (ready(right, False, ACC), ready(middle, False, ACC), ready(left, False, ACC))
        if v >= 2:
            top = add_products(top, g, x_two_ago)
            value = window_row(w_top, g, two_rows)
            here = mask & within(row, HO)
            value = _store_dx(
                dx + x_offset, value, x_two_ago, row, column, here, H, W, C, STRIDE, RELU
            )
            if NORM:  # Outside the map the ReLU has made it zero.
                sums = sums[0] + value, sums[1] + value * x_two_ago
            dx += dx_pitch
            row += reach
        x_two_ago = x_one_ago
        if v >= 1 and v <= ROWS:
            centre = add_products(centre, g, x_one_ago)
            two_rows = window_row(w_centre, g, one_row)
        if v < ROWS:
            x_one_ago = prepared(x_rows[v], norm, RELU, NORM, ACC)
            bottom = add_products(bottom, g, x_one_ago)
            one_row = window_row(w_bottom, g, 0.0)
    return top, centre, bottom, sums


@kernel(do_not_specialize=["dilation", "N", "programs"])
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, share_ptr, dilation, N, H, W, HO, WO, C, programs,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
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

    reach = dilation // STRIDE
    zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    top, centre, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    column_blocks = tl.cdiv(WO, BLOCK_P)
    phases = tl.minimum(reach, HO)
    pieces = pieces_of(dilation, HO, STRIDE, ROWS)
    for walk in range(program, N * pieces * column_blocks, programs):
        column = walk % column_blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        piece = walk // column_blocks % pieces
        row = piece % phases + piece // phases * (reach * ROWS)
        image = (walk // column_blocks // pieces).to(tl.int64)
        top, centre, bottom, _ = _walk(
            top, centre, bottom, (0.0, 0.0), w_top, w_centre, w_bottom, (0.0, 0.0),
            dy_ptr + image * HO * WO * C, x_ptr + image * H * W * C, dx_ptr + image * H * W * C,
            (column < WO) & channel_mask, column, channel, row, reach, H, W, HO, WO, C,
            STRIDE, ROWS, RELU, False, ACC,
        )  # fmt: skip

    share = share_ptr + program.to(tl.int64) * 9 * C + channel
    _store_share(share, top, centre, bottom, channel_mask, C)


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
    of x's dtype. `config` is for the fused kernels; other odd dilations than 1 with stride 2 take
    the two separate ones. Raises `ValueError` naming the argument at fault.
    """
    if dilation % stride and dilation > 1:
        arguments = (dy, x, weight, dilation, stride, relu)
        return depthwise_input_grad(*arguments), depthwise_weight_grad(*arguments)
    check_arguments(x, weight[None, None], (dilation,), stride)
    _, (out_height, out_width) = check_dy(dy[None, None], x, weight[None, None], stride)
    images, channels, height, width = x.shape
    config = config or WeightGradConfig.default((1, 1, *dy.shape), (dilation,), stride)
    dx = empty_map(tuple(x.shape), x)
    shares = x.new_empty(config.programs, *weight.shape, dtype=accumulator_dtype(x.dtype))
    grid = (config.programs * triton.cdiv(channels, config.block_c),)
    sizes = (images, height, width, out_height, out_width, channels, config.programs)
    tile = {"ROWS": config.rows, "BLOCK_P": config.block_p, "BLOCK_C": config.block_c}
    options = {"RELU": relu, "ACC": accumulator(x.dtype), "num_warps": config.warps, **tile}
    if dilation % stride:
        _both_gradients_kernel[grid](dy, x, weight, dx, shares, *sizes, **options)
    else:
        _backward_kernel[grid](
            dy, x, weight, dx, shares, dilation, *sizes, STRIDE=stride, **options
        )
    return dx, sum_rows(shares)

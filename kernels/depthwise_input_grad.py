"""Input gradient of the depthwise branches: all edges and branches summed in one pass.

With g = dy[e, b], for stride 1

    dx[n, p, q, c] = m sum_{e, b, u, v} w[e, b, u, v, c] g[n, p - u d_b, q - v d_b, c]

where m = [x > 0] under a ReLU, else 1. One program sums a tile of dx over all maps of dy.

With stride 2 a tile position (i, j) stands for the 2 x 2 input positions (2 i, 2 j) and on. A tap
u of an even dilation reaches only even rows, from output row i - u d / 2; of an odd dilation,
u = 0 reaches the even row from i, and u = -1 or 1 the odd row from i + (1 - u d) / 2. So each tap
belongs to exactly one of the four positions, and none is computed in vain.

Least traffic, in maps of y: E B + 2 s^2 with a ReLU, E B + s^2 without. Arithmetic: 9 E B
multiply-adds an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, empty_map
from lgcnet_fast.kernels.depthwise import check_arguments, check_dy, dilation_of, pack


@dataclass(frozen=True)
class InputGradConfig:
    """Tile of one program: `block_p` output positions, `block_c` channels."""

    block_p: int
    block_c: int
    warps: int

    @classmethod
    def default(cls, channels: int, stride: int) -> InputGradConfig:
        """16 bytes a thread and load of 16-bit storage; stride 2 holds four tiles of dx."""
        block_c = min(64, triton.next_power_of_2(channels))
        return cls(block_p=(2048 if stride == 1 else 1024) // block_c, block_c=block_c, warps=4)


@triton.jit
def _store(x, dx, value, offset, row, column, mask, H, W, RELU: tl.constexpr):
    """Writes dx at `offset` from the pointers x and dx, masked by the ReLU."""
    inside = mask & (row < H) & (column < W)
    if RELU:
        # Where x is NaN the gradient passes, as PyTorch's does.
        dead = tl.load(x + offset, mask=inside, other=0.0) <= 0.0
        value = tl.where(dead, 0.0, value)
    tl.store(dx + offset, value, mask=inside)


@triton.jit
def _add_tap(
    dx, g, w, TAP: tl.constexpr, up, across, row, column, mask, channel_mask, HO, WO, C,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx with tap TAP of the window added."""
    inside = (row + up >= 0) & (row + up < HO) & (column + across >= 0) & (column + across < WO)
    value = tl.load(g + (up * WO + across) * C, mask=mask & inside, other=0.0).to(ACC)
    return dx + tl.load(w + TAP * C, mask=channel_mask, other=0.0).to(ACC) * value


@triton.jit
def _add_window(dx, g, w, reach, row, column, mask, channel_mask, HO, WO, C, ACC: tl.constexpr):
    """All nine taps, `reach` positions apart, when they belong to one input position."""
    for tap in tl.static_range(9):
        up = (1 - tap // 3) * reach
        across = (1 - tap % 3) * reach
        dx = _add_tap(dx, g, w, tap, up, across, row, column, mask, channel_mask, HO, WO, C, ACC)
    return dx


@triton.jit
def _add_odd_window(
    ee, eo, oe, oo, g, w, dilation, row, column, mask, channel_mask, HO, WO, C,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stride 2, odd dilation: `eo` is dx of the even row and odd column, and so on."""
    up = (dilation + 1) // 2
    down = (1 - dilation) // 2
    oo = _add_tap(oo, g, w, 0, up, up, row, column, mask, channel_mask, HO, WO, C, ACC)
    oe = _add_tap(oe, g, w, 1, up, 0, row, column, mask, channel_mask, HO, WO, C, ACC)
    oo = _add_tap(oo, g, w, 2, up, down, row, column, mask, channel_mask, HO, WO, C, ACC)
    eo = _add_tap(eo, g, w, 3, 0, up, row, column, mask, channel_mask, HO, WO, C, ACC)
    ee = _add_tap(ee, g, w, 4, 0, 0, row, column, mask, channel_mask, HO, WO, C, ACC)
    eo = _add_tap(eo, g, w, 5, 0, down, row, column, mask, channel_mask, HO, WO, C, ACC)
    oo = _add_tap(oo, g, w, 6, down, up, row, column, mask, channel_mask, HO, WO, C, ACC)
    oe = _add_tap(oe, g, w, 7, down, 0, row, column, mask, channel_mask, HO, WO, C, ACC)
    oo = _add_tap(oo, g, w, 8, down, down, row, column, mask, channel_mask, HO, WO, C, ACC)
    return ee, eo, oe, oo


@triton.jit(do_not_specialize=["packed_dilations", "row_step", "N", "maps", "branches"])
def _input_grad_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, packed_dilations, row_step,
    N, H, W, HO, WO, C, maps, branches,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P output positions, BLOCK_C channels, all maps of dy.

    Rows are visited `row_step` apart, so that a tile of one branch reads its rows of dy about
    once instead of three times.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tile = tl.program_id(0) // channel_blocks
    position = tile * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    chain = tl.cdiv(HO, row_step)
    column = position % WO
    turn = position // WO % (chain * row_step)
    image = (position // WO // (chain * row_step)).to(tl.int64)
    row = turn // chain + turn % chain * row_step
    channel_mask = channel < C
    mask = channel_mask & (image < N) & (row < HO)

    offset = ((image * H + STRIDE * row) * W + STRIDE * column) * C + channel
    x = x_ptr + offset
    dx = dx_ptr + offset
    g = dy_ptr + ((image * HO + row) * WO + column) * C + channel
    w = w_ptr + channel
    y_size = N.to(tl.int64) * HO * WO * C
    ee = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    if STRIDE == 1:
        for k in range(maps):
            reach = dilation_of(packed_dilations, k % branches)
            ee = _add_window(ee, g, w, reach, row, column, mask, channel_mask, HO, WO, C, ACC)
            g += y_size
            w += 9 * C
    else:
        eo = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
        oe = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
        oo = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
        for k in range(maps):
            dilation = dilation_of(packed_dilations, k % branches)
            if dilation % 2 == 0:
                ee = _add_window(
                    ee, g, w, dilation // 2, row, column, mask, channel_mask, HO, WO, C, ACC
                )
            else:
                ee, eo, oe, oo = _add_odd_window(
                    ee, eo, oe, oo, g, w, dilation, row, column, mask, channel_mask, HO, WO, C, ACC
                )
            g += y_size
            w += 9 * C
        down, right = W * C, C
        _store(x, dx, eo, right, 2 * row, 2 * column + 1, mask, H, W, RELU)
        _store(x, dx, oe, down, 2 * row + 1, 2 * column, mask, H, W, RELU)
        _store(x, dx, oo, down + right, 2 * row + 1, 2 * column + 1, mask, H, W, RELU)
    _store(x, dx, ee, 0, STRIDE * row, STRIDE * column, mask, H, W, RELU)


def depthwise_multi_input_grad(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    dilations: Sequence[int],
    stride: int = 1,
    relu: bool = False,
    config: InputGradConfig | None = None,
) -> Tensor:
    """dx of `depthwise_multi`, like x: the sum over all edges and branches.

    dy: (edges, branches, N, C, ceil(H / stride), ceil(W / stride)), dense channels_last maps one
    after the other, of x's dtype; the others as in `depthwise_multi`. Raises `ValueError` naming
    the argument at fault.
    """
    edges, branches, channels = check_arguments(x, weights, dilations, stride)
    images, _, height, width = x.shape
    out_height, out_width = check_dy(dy, x, weights, stride)
    config = config or InputGradConfig.default(channels, stride)
    row_step = _row_step(dilations, stride, out_height)
    positions = images * out_width * row_step * triton.cdiv(out_height, row_step)
    blocks = triton.cdiv(positions, config.block_p) * triton.cdiv(channels, config.block_c)
    dx = empty_map(tuple(x.shape), x)
    _input_grad_kernel[(blocks,)](
        dy, x, weights, dx, pack(dilations), row_step,
        images, height, width, out_height, out_width, channels, edges * branches, branches,
        STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype),
        BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return dx


def depthwise_input_grad(
    dy: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, stride: int = 1, relu: bool = False
) -> Tensor:
    """One branch: dy as the output of `depthwise`, weight (3, 3, C); dx like x."""
    return depthwise_multi_input_grad(
        dy[None, None], x, weight[None, None], (dilation,), stride, relu
    )


def _row_step(dilations: Sequence[int], stride: int, out_height: int) -> int:
    """The distance of the rows of dy that a tile shares: known for a single branch only."""
    if len(dilations) > 1 or dilations[0] % stride:
        return 1
    return min(dilations[0] // stride, out_height)

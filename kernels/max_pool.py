"""3x3 max pooling with padding 1 and stride 1 or 2, NHWC, and its gradient.

    y[n, i, j, c] = max_{u, v in {-1, 0, 1}} x[n, s i + u, s j + v, c]

with ceil(H / s) x ceil(W / s) outputs. As in PyTorch the first maximum of a window, row by row,
wins its gradient, and a NaN beats every number and an earlier NaN.

No index is stored: the gradient finds the winners again. A pixel wins a window if its row of the
window does, and the pixel its row, where the last winner is the last NaN or, without one, the
first maximum: the same rule along both axes. Every program walks down columns of pixels; of each
row it loads it keeps the maxima of the row's windows and which of them its pixels win, and so
needs every row once.

Least traffic: x + y forward, x + dy + dx backward. With stride 1, where the gradient compares most,
it takes some 100 instructions an element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, check_like, check_map, empty_map


@dataclass(frozen=True)
class PoolConfig:
    """Tile of one program: `rows` outputs of each of `block_p` columns, `block_c` channels."""

    rows: int
    block_p: int
    block_c: int
    warps: int

    @classmethod
    def forward(cls, y_shape: tuple[int, ...]) -> PoolConfig:
        """8 bytes of 16-bit storage a thread and load; long walks where they keep a GPU busy."""
        _, channels, height, width = y_shape
        block_c = min(64, triton.next_power_of_2(channels))
        rows = min(8 if height * width >= 4096 else 4, triton.next_power_of_2(height))
        return cls(rows, block_p=512 // block_c, block_c=block_c, warps=4)

    @classmethod
    def backward(cls, y_shape: tuple[int, ...]) -> PoolConfig:
        """4 bytes a thread and load: a thread keeps much of three rows."""
        config = cls.forward(y_shape)
        return replace(config, block_p=config.block_p // 2)


@triton.jit
def _greater(x, y):
    """The larger one; NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _beats(later, earlier):
    """Whether a value wins over the greatest of those before it in the window."""
    return (later > earlier) | (later != later)


@triton.jit
def _locate(N, HO, WO, C, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's (image, first output row, output column), (p, 1), channel (1, c) and mask."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    position = tl.program_id(0) // channel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    pieces = tl.cdiv(HO, ROWS)
    image = (position // WO // pieces).to(tl.int64)
    row = position // WO % pieces * ROWS
    return image, row, position % WO, channel, (image < N) & (channel < C)


@triton.jit
def _tap(x, column, W, C, OFFSET: tl.constexpr, mask, ACC: tl.constexpr):
    """The pixels OFFSET columns right of `column`; minus infinity outside."""
    inside = mask & (column + OFFSET >= 0) & (column + OFFSET < W)
    return tl.load(x + OFFSET * C, mask=inside, other=float("-inf")).to(ACC)


# Widths of 1 must not become constants either, which have no 64-bit form.
@triton.jit(do_not_specialize=["N", "W", "WO"])
def _forward_kernel(
    x_ptr, y_ptr, N, H, W, HO, WO, C,
    STRIDE: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS outputs of BLOCK_P columns, BLOCK_C channels."""
    image, out_row, out_column, channel, mask = _locate(N, HO, WO, C, ROWS, BLOCK_P, BLOCK_C)
    row, column = STRIDE * out_row - 1, STRIDE * out_column
    x = x_ptr + ((image * H + row) * W + column) * C + channel
    y = y_ptr + ((image * HO + out_row) * WO + out_column) * C + channel
    one_ago, two_ago = 0.0, 0.0
    for u in tl.static_range(STRIDE * (ROWS - 1) + 3):
        inside = mask & (row >= 0) & (row < H)
        left = _tap(x, column, W, C, -1, inside, ACC)
        right = _tap(x, column, W, C, 1, inside, ACC)
        greatest = _greater(_greater(left, _tap(x, column, W, C, 0, inside, ACC)), right)
        if u >= 2 and u % STRIDE == 0:
            value = _greater(_greater(two_ago, one_ago), greatest)
            tl.store(y, value.to(y_ptr.dtype.element_ty), mask=mask & (out_row < HO))
            y += WO.to(tl.int64) * C
            out_row += 1
        two_ago, one_ago = one_ago, greatest
        x += W.to(tl.int64) * C
        row += 1


@triton.jit
def _winning_row(top, centre, bottom, first):
    """Whether top, centre, bottom row win a window; `first`: it has no row above."""
    centre_beats = _beats(centre, top) | first
    bottom_wins = _beats(bottom, _greater(top, centre))
    return ~(centre_beats | bottom_wins), centre_beats & ~bottom_wins, bottom_wins


@triton.jit
def _give(dx, wins_row, wins_window, g):
    return dx + tl.where(wins_row & wins_window, g, 0.0)


@triton.jit
def _windows_of_row(x, column, W, C, mask, ACC: tl.constexpr):
    """Of the three stride-1 windows around a column: (maxima of this row, column wins it)."""
    far_left = _tap(x, column, W, C, -2, mask, ACC)
    left = _tap(x, column, W, C, -1, mask, ACC)
    middle = _tap(x, column, W, C, 0, mask, ACC)
    right = _tap(x, column, W, C, 1, mask, ACC)
    far_right = _tap(x, column, W, C, 2, mask, ACC)
    before, after = _greater(far_left, left), _greater(right, far_right)
    maxima = (
        _greater(before, middle),
        _greater(_greater(left, middle), right),
        _greater(middle, after),
    )
    wins = (
        _beats(middle, before),
        (_beats(middle, left) | (column == 0)) & ~_beats(right, middle),
        ~_beats(after, middle),
    )
    return maxima, wins


@triton.jit(do_not_specialize=["N", "W"])
def _backward_kernel(
    x_ptr, dy_ptr, dx_ptr, N, H, W, C,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stride 1. One program: dx of ROWS pixels of BLOCK_P columns, BLOCK_C channels."""
    image, first, column, channel, mask = _locate(N, H, W, C, ROWS, BLOCK_P, BLOCK_C)
    pitch = W.to(tl.int64) * C
    offset = ((image * H + first) * W + column) * C + channel
    x, dy, dx = x_ptr + offset - 2 * pitch, dy_ptr + offset - pitch, dx_ptr + offset
    no_maxima, no_wins = (0.0, 0.0, 0.0), (False, False, False)
    top, centre, top_wins, centre_wins = no_maxima, no_maxima, no_wins, no_wins
    dx_top, dx_centre = 0.0, 0.0
    for u in tl.static_range(ROWS + 4):
        # Row first + u - 2 completes the windows of the row above it, and those the dx above that.
        row = first + (u - 2)
        bottom, bottom_wins = _windows_of_row(x, column, W, C, mask & (row >= 0) & (row < H), ACC)
        dx_bottom = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        if u >= 2:
            inside = mask & (row >= 1) & (row <= H)
            for v in tl.static_range(3):
                beside = inside & (column + (v - 1) >= 0) & (column + (v - 1) < W)
                g = tl.load(dy + (v - 1) * C, mask=beside, other=0.0).to(ACC)
                at_top, at_centre, at_bottom = _winning_row(top[v], centre[v], bottom[v], row == 1)
                dx_top = _give(dx_top, top_wins[v], at_top, g)
                dx_centre = _give(dx_centre, centre_wins[v], at_centre, g)
                dx_bottom = _give(dx_bottom, bottom_wins[v], at_bottom, g)
            dy += pitch
        if u >= 4:
            tl.store(dx, dx_top.to(dx_ptr.dtype.element_ty), mask=mask & (row - 2 < H))
            dx += pitch
        top, top_wins, dx_top = centre, centre_wins, dx_centre
        centre, centre_wins, dx_centre = bottom, bottom_wins, dx_bottom
        x += pitch


@triton.jit
def _windows_of_even_row(x, column, W, C, mask, ACC: tl.constexpr):
    """Of the stride-2 windows at columns `column` and `column` + 2: the maxima of this row, and
    whether `column` wins the first, `column` + 1 the first, `column` + 1 the second."""
    left = _tap(x, column, W, C, -1, mask, ACC)
    middle = _tap(x, column, W, C, 0, mask, ACC)
    right = _tap(x, column, W, C, 1, mask, ACC)
    after = _greater(_tap(x, column, W, C, 2, mask, ACC), _tap(x, column, W, C, 3, mask, ACC))
    before = _greater(left, middle)
    right_beats = _beats(right, before)
    middle_wins = (_beats(middle, left) | (column == 0)) & ~right_beats
    maxima = (_greater(before, right), _greater(right, after))
    return maxima, (middle_wins, right_beats, ~_beats(after, right))


@triton.jit
def _give_pair(even, odd, wins, wins_window, wins_next, g, g_next):
    """dx of an even and the following odd column, with the shares of both windows added."""
    even = _give(even, wins[0], wins_window, g)
    odd = _give(odd, wins[1], wins_window, g)
    return even, _give(odd, wins[2], wins_next, g_next)


@triton.jit
def _store_pair(dx, even, odd, column, mask, W, C):
    tl.store(dx, even.to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + C, odd.to(dx.dtype.element_ty), mask=mask & (column + 1 < W))


@triton.jit(do_not_specialize=["N", "W", "WO"])
def _backward_stride_2_kernel(
    x_ptr, dy_ptr, dx_ptr, N, H, W, HO, WO, C,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: dx of the 2 x 2 pixels from each of ROWS outputs of BLOCK_P columns.

    Output row i reads the rows 2 i - 1 to 2 i + 1. The even rows and columns belong to one
    window, the odd ones also to the next.
    """
    image, out_row, out_column, channel, mask = _locate(N, HO, WO, C, ROWS, BLOCK_P, BLOCK_C)
    pitch = W.to(tl.int64) * C
    row, column = 2 * out_row, 2 * out_column
    offset = ((image * H + row) * W + column) * C + channel
    x, dx = x_ptr + offset, dx_ptr + offset
    dy = dy_ptr + ((image * HO + out_row) * WO + out_column) * C + channel
    above = mask & (row >= 1) & (row <= H)
    top, top_wins = _windows_of_even_row(x - pitch, column, W, C, above, ACC)
    even_top, odd_top = 0.0, 0.0
    for u in tl.static_range(ROWS + 1):
        centre, centre_wins = _windows_of_even_row(x, column, W, C, mask & (row < H), ACC)
        bottom, bottom_wins = _windows_of_even_row(
            x + pitch, column, W, C, mask & (row + 1 < H), ACC
        )
        inside = mask & (out_row < HO)
        g = tl.load(dy, mask=inside, other=0.0).to(ACC)
        g_next = tl.load(dy + C, mask=inside & (out_column + 1 < WO), other=0.0).to(ACC)
        at = _winning_row(top[0], centre[0], bottom[0], row == 0)
        at_next = _winning_row(top[1], centre[1], bottom[1], row == 0)
        if u >= 1:
            even, odd = _give_pair(even_top, odd_top, top_wins, at[0], at_next[0], g, g_next)
            _store_pair(dx - pitch, even, odd, column, mask & (row - 1 < H), W, C)
        if u < ROWS:
            zero = tl.zeros((BLOCK_P, BLOCK_C), ACC)
            even, odd = _give_pair(zero, zero, centre_wins, at[1], at_next[1], g, g_next)
            _store_pair(dx, even, odd, column, mask & (row < H), W, C)
            even_top, odd_top = _give_pair(zero, zero, bottom_wins, at[2], at_next[2], g, g_next)
        top, top_wins = bottom, bottom_wins
        x += 2 * pitch
        dx += 2 * pitch
        dy += WO.to(tl.int64) * C
        row += 2
        out_row += 1


def max_pool_forward(x: Tensor, stride: int = 1, config: PoolConfig | None = None) -> Tensor:
    """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)), both channels_last.

    Raises `ValueError` naming the argument at fault.
    """
    images, channels, height, width, out_height, out_width = _sizes(x, stride)
    y = empty_map((images, channels, out_height, out_width), x)
    config = config or PoolConfig.forward(tuple(y.shape))
    _forward_kernel[_grid(y, config)](
        x, y, images, height, width, out_height, out_width, channels,
        STRIDE=stride, ACC=accumulator(x.dtype),
        ROWS=config.rows, BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return y


def max_pool_backward(
    x: Tensor, dy: Tensor, stride: int = 1, config: PoolConfig | None = None
) -> Tensor:
    """dx like x, from the input x and dy, the gradient of the output, channels_last like it.

    Sums are rounded once, from the accumulator's dtype. Raises `ValueError` naming the argument
    at fault.
    """
    images, channels, height, width, out_height, out_width = _sizes(x, stride)
    check_map("dy", dy)
    check_like("dy", dy, (images, channels, out_height, out_width), x)
    if dy.dtype != x.dtype:
        raise ValueError(f"dy: dtype {dy.dtype}, but x has {x.dtype}")
    config = config or PoolConfig.backward(tuple(dy.shape))
    dx = empty_map(tuple(x.shape), x)
    tile = {"ROWS": config.rows, "BLOCK_P": config.block_p, "BLOCK_C": config.block_c}
    options = tile | {"ACC": accumulator(x.dtype), "num_warps": config.warps}
    if stride == 1:
        _backward_kernel[_grid(dy, config)](x, dy, dx, images, height, width, channels, **options)
    else:
        _backward_stride_2_kernel[_grid(dy, config)](
            x, dy, dx, images, height, width, out_height, out_width, channels, **options
        )
    return dx


def _sizes(x: Tensor, stride: int) -> tuple[int, int, int, int, int, int]:
    """(N, C, H, W) and the output's (height, width); raises `ValueError`."""
    check_map("x", x)
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride}, need 1 or 2")
    images, channels, height, width = x.shape
    return images, channels, height, width, -(-height // stride), -(-width // stride)


def _grid(y: Tensor, config: PoolConfig) -> tuple[int]:
    images, channels, height, width = y.shape
    columns = images * width * triton.cdiv(height, config.rows)
    return (triton.cdiv(columns, config.block_p) * triton.cdiv(channels, config.block_c),)

"""3x3 max pooling with padding 1 and stride 1 or 2, NHWC, and its gradient.

    y[n, i, j, c] = max_{u, v in {-1, 0, 1}} x[n, s i + u, s j + v, c]

with ceil(H / s) x ceil(W / s) outputs. As in PyTorch the first maximum of a window, row by row,
wins its gradient, and a NaN beats every number and an earlier NaN.

    dx[n, a, b, c] = sum of dy[n, i, j, c] over the windows (i, j) that x[n, a, b, c] wins

where dy is the sum of the gradients of all readers of y.

The forward pass writes the winners if they are wanted, as 3 (u + 1) + v + 1 in 8 bits each. A pixel
wins a window if its row of the window does, and the pixel its row, where the last winner is the
last NaN or, without one, the first maximum: the same rule along both axes.

Every program walks down columns of pixels, and so needs every row once.

Least traffic: x + y forward, and the bytes of the winners; all dy, these and dx backward, which
takes some 45 instructions an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, check_like, check_map, empty_map
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps

CHANNELS_LAST = torch.channels_last


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
        """8 elements a thread and load, and short walks: programs are few on small maps."""
        config = cls.forward(y_shape)
        return replace(config, rows=min(config.rows, 4), block_p=2 * config.block_p)


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
@kernel(do_not_specialize=["N", "W", "WO"])
def _max_pool_kernel(
    x_ptr, y_ptr, winner_ptr, N, H, W, HO, WO, C,
    STRIDE: tl.constexpr, WINNERS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS outputs of BLOCK_P columns, BLOCK_C channels."""
    wait_for_predecessor()
    image, out_row, out_column, channel, mask = _locate(N, HO, WO, C, ROWS, BLOCK_P, BLOCK_C)
    row, column = STRIDE * out_row - 1, STRIDE * out_column
    x = x_ptr + ((image * H + row) * W + column) * C + channel
    out = ((image * HO + out_row) * WO + out_column) * C + channel
    top, top_winner, centre, centre_winner = 0.0, 0, 0.0, 0
    for u in tl.static_range(STRIDE * (ROWS - 1) + 3):
        inside = mask & (row >= 0) & (row < H)
        left = _tap(x, column, W, C, -1, inside, ACC)
        middle = _tap(x, column, W, C, 0, inside, ACC)
        right = _tap(x, column, W, C, 1, inside, ACC)
        bottom = _greater(_greater(left, middle), right)
        bottom_winner = 0
        if WINNERS:
            bottom_winner = _winner(left, middle, right, column == 0, 0, 1, 2)
        if u >= 2 and u % STRIDE == 0:
            value = _greater(_greater(top, centre), bottom)
            inside = mask & (out_row < HO)
            tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), mask=inside)
            if WINNERS:
                winner = _winner(
                    top, centre, bottom, row == 1,
                    top_winner, 3 + centre_winner, 6 + bottom_winner,
                )  # fmt: skip
                tl.store(winner_ptr + out, winner.to(tl.uint8), mask=inside)
            out += WO.to(tl.int64) * C
            out_row += 1
        top, top_winner = centre, centre_winner
        centre, centre_winner = bottom, bottom_winner
        x += W.to(tl.int64) * C
        row += 1


@triton.jit
def _winner(first, second, third, no_first, at_first, at_second, at_third):
    """Where the winner of three is; `no_first`: the first one lies outside the map."""
    second_beats = _beats(second, first) | no_first
    third_beats = _beats(third, _greater(first, second))
    return tl.where(third_beats, at_third, tl.where(second_beats, at_second, at_first))


@triton.jit
def _window(winner_ptr, dy_ptrs, offset, mask, READERS: tl.constexpr, ACC: tl.constexpr):
    """Winner and gradient of windows; where `mask` is false, a winner that no pixel is."""
    winner = tl.load(winner_ptr + offset, mask=mask, other=255).to(tl.int32)
    g = tl.load(dy_ptrs[0] + offset, mask=mask, other=0.0).to(ACC)
    for k in tl.static_range(1, READERS):
        g += tl.load(dy_ptrs[k] + offset, mask=mask, other=0.0).to(ACC)
    return winner, g


@triton.jit
def _give(dx, winner, pixel: tl.constexpr, g):
    return tl.where(winner == pixel, dx + g, dx)


@kernel(do_not_specialize=["N", "W"])
def _max_pool_backward_kernel(
    winner_ptr, dy_ptrs, dx_ptr, N, H, W, C,
    READERS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stride 1. One program: dx of ROWS pixels of BLOCK_P columns, BLOCK_C channels."""
    wait_for_predecessor()
    image, first, column, channel, mask = _locate(N, H, W, C, ROWS, BLOCK_P, BLOCK_C)
    pitch = W.to(tl.int64) * C
    dx = dx_ptr + ((image * H + first) * W + column) * C + channel
    offset = ((image * H + first - 1) * W + column) * C + channel
    zero = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    dx_top, dx_centre = zero, zero
    for u in tl.static_range(ROWS + 2):
        # The windows around row first + u - 1 complete the dx of the row above it.
        row = first + (u - 1)
        inside = mask & (row >= 0) & (row < H)
        dx_bottom = zero
        for v in tl.static_range(3):
            beside = inside & (column + (v - 1) >= 0) & (column + (v - 1) < W)
            winner, g = _window(winner_ptr, dy_ptrs, offset + (v - 1) * C, beside, READERS, ACC)
            dx_top = _give(dx_top, winner, 2 - v, g)
            dx_centre = _give(dx_centre, winner, 5 - v, g)
            dx_bottom = _give(dx_bottom, winner, 8 - v, g)
        if u >= 2:
            tl.store(dx, dx_top.to(dx_ptr.dtype.element_ty), mask=mask & (row - 1 < H))
            dx += pitch
        dx_top, dx_centre = dx_centre, dx_bottom
        offset += pitch


@triton.jit
def _store_pair(dx, even, odd, column, mask, W, C):
    tl.store(dx, even.to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + C, odd.to(dx.dtype.element_ty), mask=mask & (column + 1 < W))


@kernel(do_not_specialize=["N", "W", "WO"])
def _max_pool_backward_stride_2_kernel(
    winner_ptr, dy_ptrs, dx_ptr, N, H, W, HO, WO, C,
    READERS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: dx of the 2 x 2 pixels from each of ROWS outputs of BLOCK_P columns.

    Output row i reads the rows 2 i - 1 to 2 i + 1. The even rows and columns belong to one
    window, the odd ones also to the next.
    """
    wait_for_predecessor()
    image, out_row, out_column, channel, mask = _locate(N, HO, WO, C, ROWS, BLOCK_P, BLOCK_C)
    pitch = W.to(tl.int64) * C
    row, column = 2 * out_row, 2 * out_column
    dx = dx_ptr + ((image * H + row) * W + column) * C + channel
    offset = ((image * HO + out_row) * WO + out_column) * C + channel
    zero = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    even_bottom, odd_bottom = zero, zero
    for u in tl.static_range(ROWS + 1):
        inside = mask & (out_row < HO)
        beside = inside & (out_column + 1 < WO)
        winner, g = _window(winner_ptr, dy_ptrs, offset, inside, READERS, ACC)
        next_winner, next_g = _window(winner_ptr, dy_ptrs, offset + C, beside, READERS, ACC)
        if u >= 1:
            even = _give(even_bottom, winner, 1, g)
            odd = _give(_give(odd_bottom, winner, 2, g), next_winner, 0, next_g)
            _store_pair(dx - pitch, even, odd, column, mask & (row - 1 < H), W, C)
        if u < ROWS:
            even = _give(zero, winner, 4, g)
            odd = _give(_give(zero, winner, 5, g), next_winner, 3, next_g)
            _store_pair(dx, even, odd, column, mask & (row < H), W, C)
            even_bottom = _give(zero, winner, 7, g)
            odd_bottom = _give(_give(zero, winner, 8, g), next_winner, 6, next_g)
        dx += 2 * pitch
        offset += WO.to(tl.int64) * C
        row += 2
        out_row += 1


def max_pool_forward(x: Tensor, stride: int = 1, config: PoolConfig | None = None) -> Tensor:
    """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)), both channels_last.

    Raises `ValueError` naming the argument at fault.
    """
    return _forward(x, stride, None, config)


def max_pool_winners(
    x: Tensor, stride: int = 1, config: PoolConfig | None = None
) -> tuple[Tensor, Tensor]:
    """As `max_pool_forward`, and the winner of each window: uint8, like the output."""
    winners = empty_map(_pooled_shape(x, stride), x.new_empty(0, dtype=torch.uint8))
    return _forward(x, stride, winners, config), winners


def _forward(x: Tensor, stride: int, winners: Tensor | None, config: PoolConfig | None) -> Tensor:
    y = empty_map(_pooled_shape(x, stride), x)
    config = config or PoolConfig.forward(tuple(y.shape))
    images, channels, height, width = x.shape
    _max_pool_kernel[_grid(y, config)](
        x, y, y if winners is None else winners, images, height, width, *y.shape[2:], channels,
        STRIDE=stride, WINNERS=winners is not None, ACC=accumulator(x.dtype),
        ROWS=config.rows, BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return y


def max_pool_backward(
    winners: Tensor,
    dys: Sequence[Tensor],
    size: tuple[int, int],
    stride: int = 1,
    config: PoolConfig | None = None,
) -> Tensor:
    """dx: (N, C, H, W), channels_last, from the winners and dys, gradients of the output: one each
    from its readers.

    size: (H, W). Sums are rounded once, from the accumulator's dtype. Raises `ValueError` naming
    the argument at fault.
    """
    if not dys:
        raise ValueError("dys: need at least one")
    dy = dys[0]
    check_maps("dys", dys, dy)
    images, channels, *_ = dy.shape
    shape = images, channels, *size
    if tuple(dy.shape[2:]) != _pooled_size(size, stride):
        raise ValueError(
            f"dys[0]: shape {tuple(dy.shape)} is not that of {shape} at stride {stride}"
        )
    check_like("winners", winners, tuple(dy.shape), dy)
    if winners.dtype != torch.uint8 or not winners.is_contiguous(memory_format=CHANNELS_LAST):
        raise ValueError(f"winners: {winners.dtype}, strides {winners.stride()}, need uint8, NHWC")
    config = config or PoolConfig.backward(tuple(dy.shape))
    dx = empty_map(shape, dy)
    tile = {"ROWS": config.rows, "BLOCK_P": config.block_p, "BLOCK_C": config.block_c}
    options = tile | {"READERS": len(dys), "ACC": accumulator(dy.dtype), "num_warps": config.warps}
    if stride == 1:
        _max_pool_backward_kernel[_grid(dy, config)](
            winners, tuple(dys), dx, images, *size, channels, **options
        )
    else:
        _max_pool_backward_stride_2_kernel[_grid(dy, config)](
            winners, tuple(dys), dx, images, *size, *dy.shape[2:], channels, **options
        )
    return dx


def _pooled_shape(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    """Of the output; raises `ValueError`."""
    check_map("x", x)
    images, channels, height, width = x.shape
    return images, channels, *_pooled_size((height, width), stride)


def _pooled_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride}, need 1 or 2")
    return -(-size[0] // stride), -(-size[1] // stride)


def _grid(y: Tensor, config: PoolConfig) -> tuple[int]:
    images, channels, height, width = y.shape
    columns = images * width * triton.cdiv(height, config.rows)
    return (triton.cdiv(columns, config.block_p) * triton.cdiv(channels, config.block_c),)

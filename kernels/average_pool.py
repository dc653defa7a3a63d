"""Average pooling of an NHWC map to several numbers of bins b at once, and its gradient.

    y[n, i, j, c] = mean of x[n, h, w, c] over h in window i, w in window j

for each b, i and j in 0 .. b - 1, where window i of a side of n positions begins at floor(i n / b)
and ends in front of ceil((i + 1) n / b). Windows overlap where b does not divide n:

    dx[n, h, w, c] = sum over windows (i, j) with (h, w) in it of dy[n, i, j, c] / its area

With RELU the mean is that of relu(x), and dx is 0 where x <= 0; NaN passes both ways.

Large windows are cut into pieces of some rows: one launch sums every piece, another adds the pieces
of each window. Means and gradients of all b lie in one vector: b after b, (N, b, b, C).

Least traffic: x forward, dx backward, and x for RELU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, accumulator_dtype, check_map, empty_map
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor

PIXELS = 512
"""Of a piece, about."""
TILE, WARPS = 4096, 4
"""Elements that a program sums at once; half as many it writes at once, a row of pixels."""
FINISHING = 16
"""Pieces that are added at once."""
MOST_BINS = 255


@dataclass(frozen=True)
class PoolWindows:
    """Where the windows of a map lie, on its device."""

    pieces: Tensor
    """(P, 4), int32: first row, row behind the last, first column, column behind the last."""
    windows: Tensor
    """(K, 5), int32: first piece, piece behind the last, windows of smaller b in front, b^2, area.
    """

    @classmethod
    def of(
        cls, height: int, width: int, bins: tuple[int, ...], device: torch.device
    ) -> PoolWindows:
        pieces: list[tuple[int, ...]] = []
        windows = []
        for count in bins:
            base = len(windows)
            for rows in _sides(height, count):
                for columns in _sides(width, count):
                    first = len(pieces)
                    pieces += [
                        (part.start, part.stop, columns.start, columns.stop)
                        for part in _cut(rows, max(1, PIXELS // len(columns)))
                    ]
                    area = len(rows) * len(columns)
                    windows.append((first, len(pieces), base, count * count, area))
        tables = (torch.tensor(table, dtype=torch.int32) for table in (pieces, windows))
        return cls(*(table.to(device) for table in tables))


def _sides(length: int, bins: int) -> list[range]:
    """The windows along an axis."""
    return [range(i * length // bins, -(-(i + 1) * length // bins)) for i in range(bins)]


def _cut(rows: range, most: int) -> Iterator[range]:
    """Into parts of about equal length."""
    parts = -(-len(rows) // most)
    for part in range(parts):
        start, stop = (rows.start + k * len(rows) // parts for k in (part, part + 1))
        yield range(start, stop)


@kernel(do_not_specialize=["P", "H", "W"])
def _pieces_kernel(
    x_ptr, partial_ptr, pieces_ptr, P, H, W, C,
    RELU: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the sum over a piece of BLOCK_C channels."""
    wait_for_predecessor()
    blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, piece = (tl.program_id(0) // blocks // P).to(tl.int64), tl.program_id(0) // blocks % P
    first_row, end_row = tl.load(pieces_ptr + 4 * piece), tl.load(pieces_ptr + 4 * piece + 1)
    first_column = tl.load(pieces_ptr + 4 * piece + 2)
    width = tl.load(pieces_ptr + 4 * piece + 3) - first_column
    x = x_ptr + ((image * H + first_row) * W + first_column) * C + channel[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for start in range(0, (end_row - first_row) * width, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (pixel < (end_row - first_row) * width) & (channel < C)[None, :]
        offset = (pixel // width * W + pixel % width).to(tl.int64) * C
        value = tl.load(x + offset, mask=mask, other=0.0)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)
        total += value.to(ACC)
    partial = partial_ptr + (image * P + piece) * C
    tl.store(partial + channel, tl.sum(total, axis=0), mask=channel < C)


@kernel(do_not_specialize=["N", "P", "K"])
def _means_kernel(
    partial_ptr, y_ptr, windows_ptr, N, P, K, C,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the mean over a window of BLOCK_C channels."""
    wait_for_predecessor()
    blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, window = (tl.program_id(0) // blocks // K).to(tl.int64), tl.program_id(0) // blocks % K
    first, end = tl.load(windows_ptr + 5 * window), tl.load(windows_ptr + 5 * window + 1)
    base, count = tl.load(windows_ptr + 5 * window + 2), tl.load(windows_ptr + 5 * window + 3)
    area = tl.load(windows_ptr + 5 * window + 4).to(ACC)
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (piece < end) & (channel < C)[None, :]
        at = partial_ptr + (image * P + piece) * C + channel[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    y = y_ptr + (N * base + image * count + window - base) * C
    tl.store(y + channel, tl.sum(total, axis=0) / area, mask=channel < C)


@triton.jit
def _share(position, window, length, bins, ACC: tl.constexpr):
    """Of a position in the mean over a window that ends behind it, along an axis; 0 outside."""
    first = window * length // bins
    count = (window * length + length + bins - 1) // bins - first
    return tl.where((window < bins) & (first <= position), 1.0 / count.to(ACC), 0.0)


@kernel(do_not_specialize=["N", "H", "W"])
def _spread_kernel(
    dy_ptr, x_ptr, dx_ptr, N, H, W, C,
    POOLS: tl.constexpr, BINS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: dx of ROWS x BLOCK_P pixels and BLOCK_C channels.

    BINS, TALL and WIDE hold 8 bits for each of POOLS: b, and how many windows a position may lie
    in, along rows and along columns.
    """
    wait_for_predecessor()
    channel_blocks, column_blocks = tl.cdiv(C, BLOCK_C), tl.cdiv(W, BLOCK_P)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    place = tl.program_id(0) // channel_blocks
    column = (place % column_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    pieces = tl.cdiv(H, ROWS)
    first = place // column_blocks % pieces * ROWS
    image = (place // column_blocks // pieces).to(tl.int64)
    mask = (column < W) & (channel < C)
    for u in tl.static_range(ROWS):
        row = first + u
        dx = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        dy = dy_ptr + channel
        for k in tl.static_range(POOLS):
            bins = (BINS >> (8 * k)) & 255
            for i in tl.static_range((TALL >> (8 * k)) & 255):
                window = row * bins // H + i
                row_share = _share(row, window, H, bins, ACC)
                for j in tl.static_range((WIDE >> (8 * k)) & 255):
                    beside = column * bins // W + j
                    share = row_share * _share(column, beside, W, bins, ACC)
                    offset = (image * bins * bins + window * bins + beside) * C
                    g = tl.load(dy + offset, mask=mask & (share > 0), other=0.0)
                    dx += g.to(ACC) * share
            dy += N.to(tl.int64) * bins * bins * C
        at = ((image * H + row) * W + column) * C + channel
        inside = mask & (row < H)
        if RELU:
            dx = tl.where(tl.load(x_ptr + at, mask=inside, other=0.0) <= 0, 0.0, dx)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def average_pools_forward(x: Tensor, windows: PoolWindows, relu: bool = False) -> Tensor:
    """x: (N, C, H, W), channels_last -> (N K C,), the means in x's dtype, ordered as above.

    windows: those of x's size. relu: the means of relu(x). Sums are rounded once. Raises
    `ValueError` naming the argument at fault.
    """
    check_map("x", x)
    images, channels, height, width = x.shape
    pieces, means = len(windows.pieces), len(windows.windows)
    partial = x.new_empty((images, pieces, channels), dtype=accumulator_dtype(x.dtype))
    y = x.new_empty(images * means * channels)
    block = _block_c(channels)
    _pieces_kernel[(images * pieces * triton.cdiv(channels, block),)](
        x, partial, windows.pieces, pieces, height, width, channels,
        RELU=relu, ACC=accumulator(x.dtype), BLOCK_P=TILE // block, BLOCK_C=block, num_warps=WARPS,
    )  # fmt: skip
    block = min(256, triton.next_power_of_2(channels))
    _means_kernel[(images * means * triton.cdiv(channels, block),)](
        partial, y, windows.windows, images, pieces, means, channels,
        ACC=accumulator(x.dtype), BLOCK_P=FINISHING, BLOCK_C=block, num_warps=WARPS,
    )  # fmt: skip
    return y


def average_pools_backward(
    dy: Tensor,
    shape: Sequence[int],
    bins: Sequence[int],
    rows: int | None = None,
    x: Tensor | None = None,
) -> Tensor:
    """dx: `shape` (N, C, H, W), channels_last, from the gradient of `average_pools_forward`.

    rows: of a program, at most. x: like dx, where the means are those of relu(x). Sums are rounded
    once. Raises `ValueError` naming the argument at fault.
    """
    images, channels, height, width = shape
    numbers = images * channels * sum(count * count for count in bins)
    if tuple(dy.shape) != (numbers,) or not dy.is_contiguous():
        raise ValueError(f"dy: shape {tuple(dy.shape)}, need ({numbers},), contiguous")
    if not bins or not all(0 < count <= MOST_BINS for count in bins):
        raise ValueError(f"bins: {list(bins)}, need some of 1 to {MOST_BINS}")
    if x is not None:
        check_map("x", x)
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"x: shape {tuple(x.shape)}, need {tuple(shape)}")
    dx = empty_map(tuple(shape), dy)
    rows = min(height, rows or (4 if height * width >= 4096 else 1))
    block_c = _block_c(channels)
    block_p = min(TILE // 2 // block_c, triton.next_power_of_2(width))
    programs = images * triton.cdiv(height, rows) * triton.cdiv(width, block_p)
    _spread_kernel[(programs * triton.cdiv(channels, block_c),)](
        dy, dx if x is None else x, dx, images, height, width, channels,
        RELU=x is not None, POOLS=len(bins), BINS=_packed(bins), TALL=_packed(_spans(height, bins)),
        WIDE=_packed(_spans(width, bins)), ACC=accumulator(dy.dtype),
        ROWS=rows, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    return dx


def _block_c(channels: int) -> int:
    """Up to 64, without idle lanes where 16 divide the channels: 16 for 48 and 144."""
    for block in (64, 32, 16):
        if channels % block == 0:
            return block
    return min(64, triton.next_power_of_2(channels))


def _spans(length: int, bins: Sequence[int]) -> list[int]:
    """In how many windows a position of an axis lies at most."""
    return [1 if length % count == 0 else min(count, -(-count // length) + 1) for count in bins]


def _packed(numbers: Sequence[int]) -> int:
    return sum(number << (8 * index) for index, number in enumerate(numbers))

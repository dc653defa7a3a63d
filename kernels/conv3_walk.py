"""A dense 3x3 convolution of few channels, or its gradient by the map, whose weights stay at hand.

What kernels/conv3.py computes, of one source and one target. A program walks down a block of
columns and keeps all weights of its channels o in shared memory. Each row of x that it loads, as
the three v have it side by side, K = (v, c), is multiplied for the three rows of y that it belongs
to: the sums of the row above are then complete, those of the others wait for the next row. So x is
read three times, and the weights once for all rows of a program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    MOST_SHARED,
    accumulator,
    check_like,
    check_map,
    check_product,
    empty_map,
    operand,
)
from lgcnet_fast.kernels.conv3 import check_windows, rectified
from lgcnet_fast.kernels.conv3_backward import _anew
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor

FEWEST_POSITIONS = 2**17
"""Two programs of short walks to each multiprocessor of an H200."""
MOST_CHANNELS = 144
"""Of a source: the weights of more leave no room for its rows."""


@dataclass(frozen=True)
class WalkConfig:
    """Of one program: `rows` rows of `block_p` columns, `block_o` channels."""

    rows: int
    block_p: int
    block_o: int
    warps: int
    stages: int

    @classmethod
    def default(
        cls, channels: int, out_channels: int, dtype: torch.dtype, masked: bool = False
    ) -> WalkConfig:
        """Two programs of all channels on a multiprocessor, or blocks of channels of longer walks,
        smaller ones of more channels than 48, as shared memory needs. Small tiles for 32-bit
        products, which hold their operands in registers.

        channels, out_channels: of source and target; masked: a mask comes along with each row.
        """
        if dtype.itemsize > 2:
            tile = cls(rows=8, block_p=16, block_o=16, warps=4, stages=2)
        elif out_channels <= 64:
            tile = cls(rows=8, block_p=64, block_o=64, warps=4, stages=2 if masked else 3)
        else:
            tile = cls(rows=16, block_p=64, block_o=32, warps=4, stages=3)
        while tile.shared(channels, dtype) > MOST_SHARED and tile.block_o > 16:
            tile = replace(tile, block_o=tile.block_o // 2)
        while tile.shared(channels, dtype) > MOST_SHARED and tile.block_p > 16:
            tile = replace(tile, block_p=tile.block_p // 2)
        return tile

    def shared(self, channels: int, dtype: torch.dtype) -> int:
        """Bytes of shared memory, at most: the weights; rows of the source and a mask."""
        k = sum(_parts(channels))
        values = 3 * k * self.block_o + self.stages * self.block_p * (k + self.block_o)
        return values * dtype.itemsize


def _parts(channels: int) -> tuple[int, int]:
    """Powers of two, of at least 16, that hold all k together."""
    most = max(16, triton.next_power_of_2(3 * channels + 1) // 2)
    return most, max(16, triton.next_power_of_2(max(1, 3 * channels - most)))


def walks(source: Tensor) -> bool:
    """Whether it is the faster way of what a map like this one is multiplied for.

    Of more channels the weights leave no room for rows of the map; fewer, and those of small maps,
    cost little where they are read again.
    """
    return source.shape[1] == 48 and source.numel() >= 48 * FEWEST_POSITIONS


@triton.jit
def _windows(taps_ptr, k, o, C, CO, BACKWARD: tl.constexpr, OPERAND: tl.constexpr):
    """Of each u, the weights W[o, u, k]."""
    windows = ()
    for u in tl.static_range(3):
        if BACKWARD:
            at = (k % C * (9 * CO) + ((2 - u) * 3 + 2 - k // C) * CO)[:, None] + o[None, :]
        else:
            at = o[None, :] * (9 * C) + (u * 3 * C + k)[:, None]
        w = tl.load(taps_ptr + at, mask=(k < 3 * C)[:, None] & (o < CO)[None, :], other=0.0)
        windows = windows + (w.to(OPERAND),)
    return windows


@triton.jit
def _multiplied(
    sums, x_ptr, column, k, there, windows, W,
    C: tl.constexpr, RELU: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """sums of the rows above, level with and below a row of x, with its products by some k added.

    x_ptr: of the columns, (BLOCK_P, 1); there: whether the row is in the map.
    """
    shifted = column[:, None] + (k // C - 1)[None, :]
    inside = there & (shifted >= 0) & (shifted < W) & (k < 3 * C)[None, :]
    x = tl.load(x_ptr + (k - C)[None, :], mask=inside, other=0.0)
    x = (rectified(x) if RELU else _anew(x)).to(OPERAND)
    added = ()
    for i in tl.static_range(3):
        total = tl.dot(
            x, windows[2 - i], sums[i], input_precision="ieee", out_dtype=sums[i].dtype
        )  # fmt: skip
        added = added + (total,)
    return added


@kernel(do_not_specialize=["images", "rows"])
def _conv3_walk_kernel(
    x_ptr, taps_ptr, mask_ptr, y_ptr, images, H, W, CO, rows,
    C: tl.constexpr, BACKWARD: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
    MOST_K: tl.constexpr, REST_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `rows` rows of BLOCK_P columns, BLOCK_O channels.

    Columns are numbered across images. Programs of the same positions are neighbours in launch
    order. All k come in two parts, of which none is masked if C is 48.
    """
    wait_for_predecessor()
    blocks = tl.cdiv(CO, BLOCK_O)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    segments = tl.cdiv(H, rows)
    first = tl.program_id(0) // blocks % segments * rows
    place = tl.program_id(0) // blocks // segments * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.where(place < images * W, place % W, -2)
    at = ((place // W).to(tl.int64) * H * W + column)[:, None]
    most = tl.arange(0, MOST_K)
    rest = MOST_K + tl.arange(0, REST_K)
    of_most = _windows(taps_ptr, most, o, C, CO, BACKWARD, OPERAND)
    of_rest = _windows(taps_ptr, rest, o, C, CO, BACKWARD, OPERAND)

    above = tl.zeros((BLOCK_P, BLOCK_O), dtype=ACC)
    level = tl.zeros((BLOCK_P, BLOCK_O), dtype=ACC)
    pitch, out_pitch = tl.cast(W, tl.int64) * C, tl.cast(W, tl.int64) * CO
    x_ptr += at * C
    result = at * CO + o[None, :]
    stored = (column >= 0)[:, None] & (o < CO)[None, :]
    for row in tl.range(first - 1, min(first + rows, H) + 1, num_stages=STAGES):
        sums = (above, level, tl.zeros((BLOCK_P, BLOCK_O), dtype=ACC))
        there = (row >= 0) & (row < H)
        row_ptr = x_ptr + row * pitch
        rectifies: tl.constexpr = RELU and not BACKWARD
        sums = _multiplied(sums, row_ptr, column, most, there, of_most, W, C, rectifies, OPERAND)
        sums = _multiplied(sums, row_ptr, column, rest, there, of_rest, W, C, rectifies, OPERAND)
        value, above, level = sums
        y_at = (row - 1) * out_pitch + result
        complete = stored & (row > first)
        if RELU and BACKWARD:
            # Where x is NaN the gradient passes, as PyTorch's does.
            dead = tl.load(mask_ptr + y_at, mask=complete, other=0.0) <= 0.0
            value = tl.where(dead, 0.0, value)
        tl.store(y_ptr + y_at, value, mask=complete)


def _launch(
    x: Tensor, weight: Tensor, mask: Tensor, y: Tensor, backward: bool, relu: bool,
    config: WalkConfig,
) -> None:  # fmt: skip
    check_product("x", mask)
    images, channels, height, width = x.shape
    out_channels = y.shape[1]
    programs = triton.cdiv(images * width, config.block_p) * triton.cdiv(height, config.rows)
    programs *= triton.cdiv(out_channels, config.block_o)
    most, rest = _parts(channels)
    _conv3_walk_kernel[(programs,)](
        x, weight, mask, y, images, height, width, out_channels, config.rows,
        C=channels, BACKWARD=backward, RELU=relu, ACC=accumulator(x.dtype),
        OPERAND=operand(x.dtype), BLOCK_P=config.block_p, BLOCK_O=config.block_o,
        MOST_K=most, REST_K=rest, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def conv3_walk(
    x: Tensor, weight: Tensor, relu: bool = False, config: WalkConfig | None = None
) -> Tensor:
    """As `conv3_forward`, of one weight and up to MOST_CHANNELS of x."""
    _check_source("x", x)
    check_windows([weight], x)
    y = empty_map((x.shape[0], len(weight), *x.shape[2:]), x)
    config = config or WalkConfig.default(x.shape[1], len(weight), x.dtype)
    _launch(x, weight, x, y, False, relu, config)
    return y


def conv3_walk_input_grad(
    dy: Tensor, x: Tensor, weight: Tensor, relu: bool = False, config: WalkConfig | None = None
) -> Tensor:
    """As `conv3_input_grad`, of one result of up to MOST_CHANNELS."""
    check_map("x", x)
    _check_source("dy", dy)
    check_windows([weight], x)
    check_like("dy", dy, (x.shape[0], len(weight), *x.shape[2:]), x)
    if dy.dtype != x.dtype:
        raise ValueError(f"dy: dtype {dy.dtype}, x has {x.dtype}")
    dx = empty_map(tuple(x.shape), x)
    config = config or WalkConfig.default(len(weight), x.shape[1], x.dtype, relu)
    _launch(dy, weight, x, dx, True, relu, config)
    return dx


def _check_source(name: str, source: Tensor) -> None:
    check_map(name, source)
    if source.shape[1] > MOST_CHANNELS:
        raise ValueError(f"{name}: {source.shape[1]} channels, need up to {MOST_CHANNELS}")

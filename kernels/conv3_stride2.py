"""Dense 3x3 convolutions of NHWC maps, padding 1, stride 2, and transposed ones.

A row of a map lies in memory as one vector, so that the three columns of taps are neighbours in it:
with x[n, p](f) for f = q C + c, zero outside of the row, and u in {-1, 0, 1},

    y[n, i, j, o] = sum_{u, k} w_u[o, k] x[n, 2 i + u]((2 j - 1) C + k)             0 <= k < 3 C

where w_u[o, (v + 1) C + c] = w[o, u, v, c]. The other way round, two columns of x see two of y:

    x[n, 2 i](2 j C + m)     = sum_k b_0[k, m] y[n, i](j C_out + k)                 0 <= k < 2 C_out
    x[n, 2 i + 1](2 j C + m) = sum_k b_1[k, m] y[n, i](j C_out + k)                 0 <= m < 2 C
                                   + b_-1[k, m] y[n, i + 1](j C_out + k)

where b_u[d C_out + o, e C + c] = w[o, u, e - 2 d, c], zero for d = 1, e = 0. That is the gradient
of the map of the first, the result of a transposed convolution, whose own gradient is the first.

A program takes some rows of y, or pairs of rows of x, of a block of columns of y, numbered across
images, and a block of channels o or m. It loads each row of the source once for a block of k. In a
block of m < C it leaves out d = 1. A block that has both m < C and others multiplies zeros: there
a NaN or an infinity in y makes NaN of the column on its left, too.

Several convolutions of one x are one launch, as are their gradients of x, summed. The second form
may be of relu(y); the first then gives the gradient of y, zero where y is not positive. NaN passes
both.

Least traffic: x and all y once. Arithmetic: 9 C C_out multiply-adds a position of each y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    MOST_SHARED,
    accumulator,
    check_map,
    check_product,
    empty_map,
    has_large_cores,
    operand,
)
from lgcnet_fast.kernels.conv3 import check_windows, rectified
from lgcnet_fast.kernels.launches import INTERPRETED, kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.slabs import pointer_of

MOST_CHANNELS = 128
"""On either side."""
FEWEST_PROGRAMS = 200
"""For 132 multiprocessors, each of which holds two or three."""


@dataclass(frozen=True)
class Stride2Config:
    """Of one program: `rows` rows of y, `block_p` columns of it, `block_n` channels of the result
    and `block_k` of the source at a time, of which `stages` are on their way."""

    rows: int
    block_p: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    targets: int = 1
    """Results of which it makes its block, one after the other for the same rows of the source."""

    @classmethod
    def strided(
        cls, shape: Sequence[int], out_channels: int, dtype: torch.dtype, targets: int = 1
    ) -> Stride2Config:
        """shape: of each of the results y, (N, any, H, W).

        Two rows, and two targets in larger programs, if programs suffice. Of wide blocks there are
        few, so that they take longer steps where shared memory allows.
        """
        block_n = 128 if out_channels % 128 == 0 else _block(out_channels)
        enough = _programs(shape, out_channels, block_n) >= FEWEST_PROGRAMS
        if enough and targets % 2 == 0 and block_n == 64:
            tile = cls(2, 128, block_n, 32, warps=8, stages=3, targets=2)
        else:
            rows, block_k = 2 if enough else 1, 64 if block_n > 64 else 32
            tile = cls(rows, 64, block_n, block_k, warps=4, stages=3)
        while tile.shared_of_strided(dtype) > MOST_SHARED and tile.block_k > 16:
            tile = replace(tile, block_k=tile.block_k // 2)
        return tile

    @classmethod
    def transposed(cls, shape: Sequence[int], channels: int) -> Stride2Config:
        """shape: of y, (N, any, H, W); channels: of the result."""
        block_n = _block(2 * channels)
        rows = 2 if _programs(shape, 2 * channels, block_n) >= FEWEST_PROGRAMS else 1
        return cls(rows, 64, block_n, 32, warps=4, stages=4)

    def shared_of_strided(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory, at most: rows of x and weights on their way."""
        values = (2 * self.rows + 1) * self.block_p + 3 * self.targets * self.block_n
        return self.stages * values * self.block_k * dtype.itemsize


def _block(values: int) -> int:
    return min(64, max(16, triton.next_power_of_2(values)))


def _programs(shape: Sequence[int], values: int, block_n: int) -> int:
    """Of two rows of 64 columns of maps like y, in blocks of so many values."""
    images, _, height, width = shape
    places = triton.cdiv(images * width, 64) * triton.cdiv(height, 2)
    return places * triton.cdiv(values, block_n)


@kernel(do_not_specialize=["images", "H", "HO"])
def _strided_kernel(
    x_ptr, w_ptrs, mask_ptr, y_ptrs, images, H, W, HO, WO, C: tl.constexpr, CO: tl.constexpr,
    TARGETS: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs of the same positions are neighbours in launch order."""
    wait_for_predecessor()
    WHOLE: tl.constexpr = 3 * C % BLOCK_K == 0
    blocks_o = tl.cdiv(CO, BLOCK_N)
    blocks = blocks_o * (TARGETS // GROUP)
    segments = tl.cdiv(HO, ROWS)
    block = tl.program_id(0) % blocks
    o = block % blocks_o * BLOCK_N + tl.arange(0, BLOCK_N)
    group = block // blocks_o * GROUP
    first = tl.program_id(0) // blocks % segments * ROWS
    place = tl.program_id(0) // blocks // segments * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (place // WO).to(tl.int64)
    column = tl.where(place < images * WO, place % WO, -2)
    # Where there is no column, all of 3 C values begin and end before the row.
    begin = (2 * column - 1) * C
    pitch = tl.cast(W, tl.int64) * C
    x_at = (image * H * pitch + begin)[:, None]
    o_at = (o * (9 * C))[None, :]

    sums = ()
    for _ in tl.static_range(ROWS * GROUP):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_N), dtype=ACC),)
    for first_k in tl.range(0, 3 * C, BLOCK_K, num_stages=STAGES):
        k = first_k + tl.arange(0, BLOCK_K)
        place_in_row = begin[:, None] + k[None, :]
        inside = (place_in_row >= 0) & (place_in_row < W * C)
        wanted = (o < CO)[None, :]
        if not WHOLE:
            inside = inside & (k < 3 * C)[None, :]
            wanted = wanted & (k < 3 * C)[:, None]
        windows = ()
        for t in tl.static_range(GROUP):
            w_ptr = pointer_of(w_ptrs, group + t, TARGETS)
            for u in tl.static_range(3):
                w = tl.load(w_ptr + u * (3 * C) + (o_at + k[:, None]), mask=wanted, other=0.0)
                windows = windows + (w.to(OPERAND),)
        for r in tl.static_range(2 * ROWS + 1):
            row = 2 * first + (r - 1)
            there = inside & (row >= 0) & (row < H)
            x = tl.load(x_ptr + row * pitch + (x_at + k[None, :]), mask=there, other=0.0)
            x = x.to(OPERAND)
            added = ()
            for i in tl.static_range(ROWS * GROUP):
                value = sums[i]
                # The row of this sum is i // GROUP, and u is r - 1 - 2 (i // GROUP).
                if (r >= i // GROUP * 2) and (r <= i // GROUP * 2 + 2):
                    w = windows[i % GROUP * 3 + r - i // GROUP * 2]
                    value = tl.dot(x, w, value, input_precision="ieee", out_dtype=ACC)
                added = added + (value,)
            sums = added

    y_at = (image * HO * WO + column)[:, None] * CO + o[None, :]
    inside = (column >= 0)[:, None] & (o < CO)[None, :]
    for i in tl.static_range(ROWS * GROUP):
        row = first + i // GROUP
        entry = row * (tl.cast(WO, tl.int64) * CO) + y_at
        stored = inside & (row < HO)
        value = sums[i]
        if MASKED:
            # Where the map is NaN the gradient passes, as PyTorch's does.
            dead = tl.load(mask_ptr + entry, mask=stored, other=0.0) <= 0.0
            value = tl.where(dead, 0.0, value)
        tl.store(pointer_of(y_ptrs, group + i % GROUP, TARGETS) + entry, value, mask=stored)


@kernel(do_not_specialize=["images", "H", "HO"])
def _transposed_kernel(
    y_ptrs, w_ptrs, x_ptr, images, H, W, HO, WO, C: tl.constexpr, CO: tl.constexpr,
    SOURCES: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs of the same positions are neighbours in launch order."""
    wait_for_predecessor()
    WHOLE: tl.constexpr = CO % BLOCK_K == 0
    blocks = tl.cdiv(2 * C, BLOCK_N)
    segments = tl.cdiv(HO, ROWS)
    first_m = tl.program_id(0) % blocks * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_N)
    values = tl.where(first_m + BLOCK_N <= C, CO, 2 * CO)
    first = tl.program_id(0) // blocks % segments * ROWS
    place = tl.program_id(0) // blocks // segments * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (place // WO).to(tl.int64)
    column = tl.where(place < images * WO, place % WO, WO)
    begin = column * CO
    pitch = tl.cast(WO, tl.int64) * CO
    y_at = (image * HO * pitch + begin)[:, None]

    sums = ()
    for _ in tl.static_range(2 * ROWS):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_N), dtype=ACC),)
    steps = tl.cdiv(values, BLOCK_K)
    for step in tl.range(0, SOURCES * steps, num_stages=STAGES):
        source = step // steps if SOURCES > 1 else 0
        k = (step - source * steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        y_ptr = pointer_of(y_ptrs, source, SOURCES)
        w_ptr = pointer_of(w_ptrs, source, SOURCES)
        inside = begin[:, None] + k[None, :] < WO * CO
        # d = 1 has taps for the second column alone.
        wanted = (m < 2 * C)[None, :] & ((m >= C)[None, :] | (k < CO)[:, None])
        if not WHOLE:
            inside = inside & (k < values)[None, :]
            wanted = wanted & (k < values)[:, None]
        w_row = tl.where(k < CO, k * (9 * C) + C, (k - CO) * (9 * C) - C)
        windows = ()
        for u in tl.static_range(3):
            w = tl.load(w_ptr + u * (3 * C) + (w_row[:, None] + m[None, :]), mask=wanted, other=0.0)
            windows = windows + (w.to(OPERAND),)
        for r in tl.static_range(ROWS + 1):
            row = first + r
            y = tl.load(
                y_ptr + row * pitch + (y_at + k[None, :]), mask=inside & (row < HO), other=0.0
            )
            if RELU:
                y = rectified(y)
            y = y.to(OPERAND)
            added = ()
            for p in tl.static_range(2 * ROWS):
                value = sums[p]
                # p - 2 r is 0 or 1 for u = 0 or 1, and -1 for u = -1.
                if (p - 2 * r >= -1) and (p - 2 * r <= 1):
                    w = windows[p - 2 * r + 1]
                    value = tl.dot(y, w, value, input_precision="ieee", out_dtype=ACC)
                added = added + (value,)
            sums = added

    place_in_row = (2 * column * C)[:, None] + m[None, :]
    inside = (place_in_row < W * C) & (m < 2 * C)[None, :]
    pitch = tl.cast(W, tl.int64) * C
    x_at = (image * H * pitch)[:, None] + place_in_row
    for p in tl.static_range(2 * ROWS):
        row = 2 * first + p
        tl.store(x_ptr + row * pitch + x_at, sums[p], mask=inside & (row < H))


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels, `strided_weight_grad` too, suit maps like x, on either side.

    weight: (C_out, C, 3, 3), where channels in whole eights fill the units in which maps are read.
    32-bit products run outside the matrix units, where libraries tile better, and wider maps have
    not been measured.
    """
    if x.dtype.itemsize != 2 or weight.shape[2:] != (3, 3):
        return False
    return all(count % 8 == 0 and count <= MOST_CHANNELS for count in weight.shape[:2])


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are the way to take for maps like x on their device.

    From sm_90 on, and not on the smaller ones of later GPUs, which have less shared memory.
    """
    if not fits(x, weight):
        return False
    if INTERPRETED:
        return True
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and has_large_cores(x)


def strided_convolutions(
    x: Tensor,
    weights: Sequence[Tensor],
    config: Stride2Config | None = None,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Of x with every weight: (N, C_out, ceil(H / 2), ceil(W / 2)), like x.

    x: (N, C, H, W); weights: (C_out, C, 3, 3); mask: like a result, which is zero where it is
    not positive; all channels_last, of one dtype. float64 is for the interpreter only. Raises
    `ValueError` naming the argument at fault.
    """
    check_map("x", x)
    check_windows(weights, x)
    check_product("x", x)
    images, _, *size = x.shape
    out_channels = len(weights[0])
    ys = [empty_map((images, out_channels, *small_size(size)), x) for _ in weights]
    if mask is not None:
        check_maps("mask", [mask], ys[0])
    config = config or Stride2Config.strided(ys[0].shape, out_channels, x.dtype, len(ys))
    if len(ys) % config.targets:
        raise ValueError(f"config: targets {config.targets} of {len(ys)}")
    blocks = triton.cdiv(out_channels, config.block_n) * (len(ys) // config.targets)
    _strided_kernel[(_segments(ys[0], config) * blocks,)](
        x, tuple(weights), x if mask is None else mask, tuple(ys), images, *size, *ys[0].shape[2:],
        TARGETS=len(ys), MASKED=mask is not None, GROUP=config.targets,
        **_constants(x, weights[0], config),
    )  # fmt: skip
    return ys


def transposed_convolutions(
    ys: Sequence[Tensor],
    weights: Sequence[Tensor],
    size: Sequence[int],
    config: Stride2Config | None = None,
    relu: bool = False,
) -> Tensor:
    """(N, C, *size), like each y: the sum of their transposed convolutions, or those of relu(y).

    It is the gradient of x in `strided_convolutions`, where these are of the results. ys: (N,
    C_out, H, W); weights: (C_out, C, 3, 3), as many; all channels_last, of one dtype; size: 2 n - 1
    or 2 n for each side n of y. float64 is for the interpreter only. Raises `ValueError` naming the
    argument at fault.
    """
    check_maps("ys", ys, ys[0] if len(ys) else None)
    images, out_channels, *small = ys[0].shape
    if len(ys) != len(weights):
        raise ValueError(f"ys: {len(ys)} maps, weights: {len(weights)}")
    if len(size) != 2 or small_size(size) != tuple(small):
        raise ValueError(f"size: {tuple(size)}, need 2 n - 1 or 2 n of {tuple(small)}")
    check_product("ys[0]", ys[0])
    channels = weights[0].shape[1]
    x = empty_map((images, channels, *size), ys[0])
    check_windows(weights, x)
    if len(weights[0]) != out_channels:
        raise ValueError(f"weights[0]: shape {tuple(weights[0].shape)}, of {out_channels} channels")
    config = config or Stride2Config.transposed(ys[0].shape, channels)
    blocks = triton.cdiv(2 * channels, config.block_n)
    _transposed_kernel[(_segments(ys[0], config) * blocks,)](
        tuple(ys), tuple(weights), x, images, *size, *small,
        SOURCES=len(ys), RELU=relu, **_constants(x, weights[0], config),
    )  # fmt: skip
    return x


def small_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of y, from those of x."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _segments(y: Tensor, config: Stride2Config) -> int:
    images, _, height, width = y.shape
    return triton.cdiv(images * width, config.block_p) * triton.cdiv(height, config.rows)


def _constants(x: Tensor, weight: Tensor, config: Stride2Config) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "C": weight.shape[1],
        "CO": len(weight),
        "ACC": accumulator(x.dtype),
        "OPERAND": operand(x.dtype),
        "ROWS": config.rows,
        "BLOCK_P": config.block_p,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }

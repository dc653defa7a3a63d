"""Dense 3x3 convolutions of NHWC maps, padding 1, stride 1, and their gradients by the maps.

Of S sources and T targets, with u, v in {-1, 0, 1} and zero outside of the maps,

    y_t[n, i, j, o] = m sum_{s, u, v, c} W_st[o, u, v, c] r(x_s[n, i + u, j + v, c])

Forward, of several convolutions of one map: S = 1, r the ReLU where there is one, m = 1. Backward,
summed over them: the sources are the gradients g_e of their results, the target is dx,
W_e1[c, u, v, o] = w_e[o, -u, -v, c], r(g) = g and m = [x > 0] under a ReLU. NaN passes both.

A program takes some rows of a block of columns, numbered across images, and a block of channels o
of one target or two. At a time it loads a block of channels c, one column v of the taps, of all
these rows and those above and below, so that each row serves up to three: three readings of x, not
nine, and as few of the weights. The sums of all rows stay in registers.

Least traffic, in maps: S + T, and x again under the mask. Arithmetic: 9 S T C C_out multiply-adds a
position.
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
    check_like,
    check_map,
    check_product,
    empty_map,
    has_large_cores,
    operand,
)
from lgcnet_fast.kernels.launches import INTERPRETED, kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.slabs import pointer_of

_INTERPRETED = tl.constexpr(INTERPRETED)
FEWEST_PROGRAMS = 200
"""For 132 multiprocessors, each of which holds two or three with small steps, one with large."""

MOST_MASKED = 144
"""Channels that are no whole 32s, of which blocks are masked; beyond, nothing has been measured."""


@dataclass(frozen=True)
class Conv3Config:
    """Of one program: `rows` rows of `block_p` columns, `block_o` channels of each of `targets`
    results, and `block_c` channels of a source at a time, of which `stages` are on their way."""

    rows: int
    block_p: int
    block_o: int
    block_c: int
    targets: int
    warps: int
    stages: int

    @classmethod
    def default(
        cls,
        shape: Sequence[int],
        channels: int,
        out_channels: int,
        dtype: torch.dtype,
        targets: int = 1,
    ) -> Conv3Config:
        """Two targets in a program, or small steps, if programs suffice; more rows of 32 channels.
        Steps of 32-bit values are as small as shared memory needs.

        shape: of all maps, (N, any, H, W); channels, out_channels: of each source and target.
        """
        images, _, height, width = shape
        block_o = _out_block(out_channels)
        programs = triton.cdiv(images * width, 64) * triton.cdiv(height, 2)
        programs *= triton.cdiv(out_channels, block_o) * targets
        together = 2 if targets % 2 == 0 and programs // 2 >= FEWEST_PROGRAMS else 1
        if programs // together >= FEWEST_PROGRAMS:
            block_c = _block(channels, 32, masked=0.125)
        else:
            block_c = _block(channels, 64, masked=0.25)
        rows = 4 if block_o * together <= 32 else 2 if programs > FEWEST_PROGRAMS // 2 else 1
        tile = cls(rows, 64, block_o, block_c, together, warps=4, stages=3)
        while tile.shared(dtype) > MOST_SHARED and tile.block_c > 16:
            tile = replace(tile, block_c=tile.block_c // 2)
        return tile

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory, at most: rows of a source and weights on their way."""
        values = (self.rows + 2) * self.block_p + 3 * self.targets * self.block_o
        return self.stages * values * self.block_c * dtype.itemsize


def _block(channels: int, most: int, masked: float) -> int:
    """The largest of which no greater part is masked, or as many as a product takes at least."""
    block = most
    while block > 16 and channels < triton.cdiv(channels, block) * block * (1 - masked):
        block //= 2
    return block


def _out_block(channels: int) -> int:
    """Where the fewest are masked; matrix units are half empty with 16."""
    if channels <= 16:
        return 16
    return min((64, 32), key=lambda block: triton.cdiv(channels, block) * block)


@triton.jit
def rectified(x):
    """max(x, 0), where NaN stays; two values of 16 bits by one instruction."""
    if not _INTERPRETED:
        if x.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 z; mov.b32 z, 0; max.NaN.bf16x2 $0, $1, z; }", "=r,r", [x],
                dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        if x.dtype == tl.float16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 z; mov.b32 z, 0; max.NaN.f16x2 $0, $1, z; }", "=r,r", [x],
                dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    return tl.where(x <= 0.0, 0.0, x)


@kernel(do_not_specialize=["images"])
def _conv3_kernel(
    x_ptrs, w_ptrs, mask_ptr, y_ptrs, images, H, W, C, CO,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr, BACKWARD: tl.constexpr, RELU: tl.constexpr,
    BLOCKS_C: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of BLOCK_P columns, BLOCK_O channels of GROUP targets.

    Columns are numbered across images. Programs of the same positions are neighbours in launch
    order. WHOLE: no channel is masked.
    """
    wait_for_predecessor()
    blocks_o = tl.cdiv(CO, BLOCK_O)
    blocks = blocks_o * (TARGETS // GROUP)
    block = tl.program_id(0) % blocks
    o = block % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    group = block // blocks_o * GROUP
    segments = tl.cdiv(H, ROWS)
    first = tl.program_id(0) // blocks % segments * ROWS
    place = tl.program_id(0) // blocks // segments * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.where(place < images * W, place % W, -2)
    at = (place // W).to(tl.int64) * H * W + column
    c = tl.arange(0, BLOCK_C)
    pitch = tl.cast(W, tl.int64) * C
    x_at = at[:, None] * C + c[None, :]
    if BACKWARD:
        of_weight = c[:, None] * (9 * CO) + o[None, :]
    else:
        of_weight = o[None, :] * (9 * C) + c[:, None]

    sums = ()
    for _ in tl.static_range(ROWS * GROUP):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_O), dtype=ACC),)
    for k in tl.range(0, SOURCES * 3 * BLOCKS_C, num_stages=STAGES):
        v = k // BLOCKS_C % 3
        first_c = k % BLOCKS_C * BLOCK_C
        source = k // (3 * BLOCKS_C)
        x_ptr = pointer_of(x_ptrs, source, SOURCES) + (v - 1) * C + first_c
        inside = ((column + (v - 1) >= 0) & (column + (v - 1) < W))[:, None]
        wanted = (o < CO)[None, :]
        if not WHOLE:
            inside = inside & (first_c + c < C)[None, :]
            wanted = wanted & (first_c + c < C)[:, None]
        windows = ()
        for t in tl.static_range(GROUP):
            if BACKWARD:
                w_ptr = pointer_of(w_ptrs, source, SOURCES) + first_c * (9 * CO) + (2 - v) * CO
                step = 3 * CO
            else:
                w_ptr = pointer_of(w_ptrs, group + t, TARGETS) + v * C + first_c
                step = 3 * C
            for u in tl.static_range(3):
                tap = 2 - u if BACKWARD else u
                if WHOLE:
                    w = tl.load(w_ptr + tap * step + of_weight)
                else:
                    w = tl.load(w_ptr + tap * step + of_weight, mask=wanted, other=0.0)
                windows = windows + (w.to(OPERAND),)
        for r in tl.static_range(ROWS + 2):
            row = first + (r - 1)
            there = inside & (row >= 0) & (row < H)
            x = tl.load(x_ptr + row * pitch + x_at, mask=there, other=0.0)
            if RELU and not BACKWARD:
                x = rectified(x)
            x = x.to(OPERAND)
            added = ()
            for i in tl.static_range(ROWS * GROUP):
                value = sums[i]
                # The row of this sum is i // GROUP, and r - 1 - u of a tap u - 1.
                if (r >= i // GROUP) and (r <= i // GROUP + 2):
                    w = windows[i % GROUP * 3 + r - i // GROUP]
                    value = tl.dot(x, w, value, input_precision="ieee", out_dtype=ACC)
                added = added + (value,)
            sums = added

    result = at[:, None] * CO + o[None, :]
    inside = (column >= 0)[:, None] & (o < CO)[None, :]
    for i in tl.static_range(ROWS * GROUP):
        row = first + i // GROUP
        y_at = row * (tl.cast(W, tl.int64) * CO) + result
        stored = inside & (row < H)
        value = sums[i]
        if RELU and BACKWARD:
            # Where x is NaN the gradient passes, as PyTorch's does.
            dead = tl.load(mask_ptr + y_at, mask=stored, other=0.0) <= 0.0
            value = tl.where(dead, 0.0, value)
        tl.store(pointer_of(y_ptrs, group + i % GROUP, TARGETS) + y_at, value, mask=stored)


def _launch(
    xs: Sequence[Tensor], weights: Sequence[Tensor], mask: Tensor, ys: Sequence[Tensor],
    backward: bool, relu: bool, config: Conv3Config,
) -> None:  # fmt: skip
    if len(ys) % config.targets:
        raise ValueError(f"config: targets {config.targets} of {len(ys)}")
    check_product("x", mask)
    images, channels, height, width = xs[0].shape
    out_channels = ys[0].shape[1]
    programs = triton.cdiv(images * width, config.block_p) * triton.cdiv(height, config.rows)
    programs *= triton.cdiv(out_channels, config.block_o) * (len(ys) // config.targets)
    whole = channels % config.block_c == out_channels % config.block_o == 0
    _conv3_kernel[(programs,)](
        tuple(xs), tuple(weights), mask, tuple(ys), images, height, width, channels, out_channels,
        SOURCES=len(xs), TARGETS=len(ys), BACKWARD=backward, RELU=relu,
        BLOCKS_C=triton.cdiv(channels, config.block_c), WHOLE=whole,
        ACC=accumulator(mask.dtype), OPERAND=operand(mask.dtype), ROWS=config.rows,
        BLOCK_P=config.block_p, BLOCK_O=config.block_o, BLOCK_C=config.block_c,
        GROUP=config.targets, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def fits(x: Tensor, out_channels: int) -> bool:
    """Whether the kernels, `conv3_weight_grad` too, suit maps like x: 16 bits, whole blocks.

    They take others too, but 32-bit products run outside the matrix units, where libraries tile
    better.
    """
    counts = (x.shape[1], out_channels)
    whole = all(count % 32 == 0 for count in counts)
    few = all(count % 16 == 0 and count <= MOST_MASKED for count in counts)
    return x.dtype.itemsize == 2 and (whole or few)


def serves(x: Tensor, out_channels: int) -> bool:
    """Whether the kernels are the way to take for maps like x on their device.

    From sm_90 on: the sums take so many registers that without its products they spill. Not on the
    smaller ones of later GPUs, which have less shared memory.
    """
    if not fits(x, out_channels):
        return False
    if INTERPRETED:
        return True
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and has_large_cores(x)


def conv3_forward(
    x: Tensor, weights: Sequence[Tensor], relu: bool = False, config: Conv3Config | None = None
) -> list[Tensor]:
    """The convolution of x, or with `relu` of relu(x), with every weight.

    x: (N, C, H, W); weights: (C_out, C, 3, 3); all channels_last, of one dtype; as are the results
    (N, C_out, H, W). float64 is for the interpreter only. Raises `ValueError` naming the argument
    at fault.
    """
    check_map("x", x)
    check_windows(weights, x)
    out_channels = len(weights[0])
    ys = [empty_map((x.shape[0], out_channels, *x.shape[2:]), x) for _ in weights]
    config = config or Conv3Config.default(x.shape, x.shape[1], out_channels, x.dtype, len(weights))
    _launch([x], weights, x, ys, False, relu, config)
    return ys


def conv3_input_grad(
    dys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], relu: bool = False,
    config: Conv3Config | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of x, like x, summed over all results of `conv3_forward`.

    dys: those of the results; the others as there. Raises `ValueError` naming the argument at
    fault.
    """
    check_map("x", x)
    check_maps("dys", dys, dys[0] if len(dys) else None)
    check_windows(weights, x)
    if len(dys) != len(weights):
        raise ValueError(f"dys: {len(dys)} maps, weights: {len(weights)}")
    out_channels = len(weights[0])
    check_like("dys[0]", dys[0], (x.shape[0], out_channels, *x.shape[2:]), x)
    if dys[0].dtype != x.dtype:
        raise ValueError(f"dys[0]: dtype {dys[0].dtype}, x has {x.dtype}")
    dx = empty_map(tuple(x.shape), x)
    config = config or Conv3Config.default(x.shape, out_channels, x.shape[1], x.dtype)
    _launch(dys, weights, x, [dx], True, relu, config)
    return dx


def check_windows(weights: Sequence[Tensor], x: Tensor) -> None:
    """Raises `ValueError` unless all are (C_out, C, 3, 3), channels_last, of the dtype of x."""
    if not len(weights):
        raise ValueError("weights: need at least one")
    for index, weight in enumerate(weights):
        name = f"weights[{index}]"
        check_like(name, weight, (len(weights[0]), x.shape[1], 3, 3), x)
        if weight.dtype != x.dtype:
            raise ValueError(f"{name}: dtype {weight.dtype}, x has {x.dtype}")
        if not weight.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name}: strides {weight.stride()}, need channels_last")

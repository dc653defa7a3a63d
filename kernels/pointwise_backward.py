"""Gradients of 1x1 convolutions of NHWC maps: both in one pass.

For B products y_b[m, o] = sum_c w[b, o, c] x[b, m, c] over the M = N H W positions m, with g = dy,

    dx[b, m, c] = sum_o w[b, o, c] g_b[m, o],    dw[b, o, c] = sum_m g_b[m, o] x[b, m, c]

A program walks tiles of positions of one product and of a block of input channels, whose columns
of dx and dw depend on no other. dw comes in two stages: every program sums its tiles, `sum_rows`
adds the shares in a fixed order. dx may take the place of x, as a tile of x is read by one program
only, before it writes there.

Least traffic, in elements: B M (2 C + C_out). Arithmetic: 2 B M C C_out multiply-adds; at 128
channels both ways in bfloat16 that is 85 operations a byte, below the 230 at which an H200's matrix
units become the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_dense,
    check_like,
    check_product,
    has_matrix_units,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps

MAX_OUT_CHANNELS = 256
"""A program holds all output channels of its positions."""
CORES = 132
"""Of an H200."""
WIDE = 144
"""Channels of three maps of the fusion cell together."""
TILES = 4
"""The fewest tiles of a program, where it has not all."""


@dataclass(frozen=True)
class ProductGradientsConfig:
    """Tile: `block_m` positions by `block_c` input channels and `rest` more, which may be none,
    `stages` of them in flight; `programs` share the positions of a product."""

    block_m: int
    block_c: int
    warps: int
    stages: int
    programs: int
    rest: int = 0

    @classmethod
    def default(
        cls, branches: int, positions: int, channels: int, out_channels: int, dtype: torch.dtype
    ) -> ProductGradientsConfig:
        """As many programs as keep about 50 KB of loads under way in each core.

        Twice as many are faster alone, but take longer to begin and to hand over their shares,
        which what runs beside them waits for.

        Small tiles where threads load single values, as odd channels make them, and for 32-bit
        products, which run outside the matrix units and hold their operands in registers. Blocks
        of channels are narrow where wide ones would leave cores idle: more programs to a product
        would have too few tiles to make up for their shares of dw. A program takes 144 channels at
        once, so that dy is read once instead of three times; beside these runs little else, so
        they take all cores.
        """
        vectors = channels % 16 == out_channels % 16 == 0
        block_m = 64 if vectors and dtype.itemsize == 2 else 32
        warps, stages = (8 if out_channels > 64 else 4, 3) if dtype.itemsize == 2 else (8, 1)
        most = triton.cdiv(positions, TILES * block_m)
        narrow = block_m == 32 or most * branches * triton.cdiv(channels, 64) < 0.75 * CORES
        block_c = min(32 if narrow else 64, max(16, triton.next_power_of_2(channels)))
        block_o = max(16, triton.next_power_of_2(out_channels))
        resident = max(0.5, 192 / (block_c + block_o))
        others = branches * triton.cdiv(channels, block_c)
        programs = min(most, max(int(resident * CORES) // others, 1))
        rest = 0
        if channels == WIDE and vectors and dtype.itemsize == 2 and not narrow:
            block_c, rest = 128, WIDE - 128
            programs = min(most, max(CORES // branches, 1))
        # The fewest that have no more tiles each.
        tiles = triton.cdiv(positions, block_m)
        programs = triton.cdiv(tiles, triton.cdiv(tiles, programs))
        return cls(block_m, block_c, warps, stages, programs, rest)


@triton.jit
def _part_of_weight(w_ptr, o, c, C, CO, OPERAND: tl.constexpr):
    inside = (o < CO)[:, None] & (c < C)
    return tl.load(w_ptr + (o[:, None] * C + c), mask=inside, other=0.0).to(OPERAND)


@triton.jit
def _part_of_tile(
    total, g, weight, x_ptr, dx_ptr, offset, mask, ACC: tl.constexpr, OPERAND: tl.constexpr
):
    """dx of some channels of a tile of positions; the sum for dw with the tile added."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(OPERAND)
    total = tl.dot(tl.trans(g), x, total, input_precision="ieee", out_dtype=ACC)
    dx = tl.dot(g, weight, input_precision="ieee", out_dtype=ACC)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return total


@kernel(do_not_specialize=["M", "programs"])
def _product_gradients_kernel(
    dy_ptrs, x_ptr, w_ptr, dx_ptr, share_ptr, M, C, CO, programs,
    BRANCHES: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th tile of a product; BLOCK_C input channels, or all of them,
    which are BLOCK_C and REST more; BLOCK_O >= CO.

    Blocks of channels of the same positions are neighbours in launch order.
    """
    wait_for_predecessor()
    blocks = tl.cdiv(C - REST, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    # 64 bits, as are the offsets into maps that come of it.
    program = (tl.program_id(0) // blocks % programs).to(tl.int64)
    branch = tl.program_id(0) // blocks // programs
    dy_ptr = dy_ptrs[0]
    for k in tl.static_range(1, BRANCHES):
        if branch == k:
            dy_ptr = dy_ptrs[k]
    branch = branch.to(tl.int64)
    x_ptr += branch * M * C
    dx_ptr += branch * M * C
    w_ptr += branch * CO * C

    lane = tl.arange(0, BLOCK_M)[:, None]
    o = tl.arange(0, BLOCK_O)
    weight = _part_of_weight(w_ptr, o, c, C, CO, OPERAND)
    total = tl.zeros((BLOCK_O, BLOCK_C), dtype=ACC)
    if REST:
        c_rest = BLOCK_C + tl.arange(0, REST)[None, :]
        weight_rest = _part_of_weight(w_ptr, o, c_rest, C, CO, OPERAND)
        total_rest = tl.zeros((BLOCK_O, REST), dtype=ACC)
    for first in range(program * BLOCK_M, M, programs * BLOCK_M):
        within = lane < M - first
        dy = dy_ptr + first * CO + (lane * CO + o[None, :])
        g = tl.load(dy, mask=within & (o < CO)[None, :], other=0.0).to(OPERAND)
        offset = first * C + (lane * C + c)
        total = _part_of_tile(
            total, g, weight, x_ptr, dx_ptr, offset, within & (c < C), ACC, OPERAND
        )
        if REST:
            offset = first * C + (lane * C + c_rest)
            total_rest = _part_of_tile(
                total_rest, g, weight_rest, x_ptr, dx_ptr, offset, within & (c_rest < C),
                ACC, OPERAND,
            )  # fmt: skip

    share = share_ptr + (program * BRANCHES + branch) * CO * C
    tl.store(share + (o[:, None] * C + c), total, mask=(o < CO)[:, None] & (c < C))
    if REST:
        inside = (o < CO)[:, None] & (c_rest < C)
        tl.store(share + (o[:, None] * C + c_rest), total_rest, mask=inside)


def serves(x: Tensor, out_channels: int) -> bool:
    """Whether `pointwise_backward` is the way to take for maps like x.

    It takes 32-bit maps too, but see `has_matrix_units`.
    """
    return out_channels <= MAX_OUT_CHANNELS and has_matrix_units(x)


def pointwise_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Tensor,
    out: Tensor | None = None,
    config: ProductGradientsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, and the shares (programs, B, C_out, C) of dw, in the accumulator's dtype, for `summed`.

    dys: the gradients of B products, (N, C_out, H, W), channels_last, up to 256 channels; x: their
    maps (B, N, C, H, W), each channels_last, one after the other; weights: (B, C_out, C),
    contiguous; all of one dtype. out: for dx, like x, or x itself. float64 is for the interpreter
    only. Raises `ValueError` naming the argument at fault.
    """
    branches, channels, out_channels = _check_arguments(dys, x, weights)
    out = _like(x) if out is None else out
    check_like("out", out, tuple(x.shape), x)
    if out.dtype != x.dtype or not out.movedim(2, -1).is_contiguous():
        raise ValueError(f"out: {out.dtype}, strides {out.stride()}, need a stack like x")
    positions = dys[0].numel() // out_channels
    config = config or ProductGradientsConfig.default(
        branches, positions, channels, out_channels, x.dtype
    )
    shape = (config.programs, branches, out_channels, channels)
    shares = x.new_empty(shape, dtype=accumulator_dtype(x.dtype))
    blocks = triton.cdiv(channels - config.rest, config.block_c)
    if config.rest and blocks > 1:
        raise ValueError(
            f"config: {channels} channels, block_c {config.block_c} and rest {config.rest}"
        )
    _product_gradients_kernel[(branches * config.programs * blocks,)](
        tuple(dys), x, weights, out, shares, positions, channels, out_channels, config.programs,
        BRANCHES=branches, ACC=accumulator(x.dtype), OPERAND=operand(x.dtype),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        BLOCK_O=max(16, triton.next_power_of_2(out_channels)), REST=config.rest,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, shares


def summed(shares: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """dw (B, C_out, C) from the shares of all programs, in tiles of up to 2048 of their values.

    In their dtype, or rounded to `dtype`.
    """
    if len(shares) == 1:
        return shares[0].to(dtype or shares.dtype)
    rows = min(256, triton.next_power_of_2(len(shares)))
    return sum_rows(shares, rows, block_columns=min(128, 2048 // rows), dtype=dtype)


def _like(x: Tensor) -> Tensor:
    """An uninitialised stack of maps with the strides of x."""
    return x.new_empty(x.movedim(2, -1).shape).movedim(-1, 2)


def _check_arguments(dys: Sequence[Tensor], x: Tensor, weights: Tensor) -> tuple[int, int, int]:
    """Products, channels and output channels; raises `ValueError`."""
    check_maps("dys", dys, dys[0] if len(dys) else None)
    check_product("dys[0]", dys[0])
    branches, (images, out_channels, height, width) = len(dys), dys[0].shape
    if out_channels > MAX_OUT_CHANNELS:
        raise ValueError(f"dys[0]: {out_channels} channels, need up to {MAX_OUT_CHANNELS}")
    if x.ndim != 5 or not x.shape[2]:
        raise ValueError(f"x: shape {tuple(x.shape)}, need maps (B, N, C, H, W)")
    channels = x.shape[2]
    check_like("x", x, (branches, images, channels, height, width), dys[0])
    if not x.movedim(2, -1).is_contiguous():
        raise ValueError(f"x: strides {x.stride()}, need dense channels_last maps")
    check_dense("weights", weights, (branches, out_channels, channels), x)
    for name, tensor in (("x", x), ("weights", weights)):
        if tensor.dtype != dys[0].dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype}, dys[0] has {dys[0].dtype}")
    return branches, channels, out_channels

"""Weight gradients of dense 3x3 convolutions of stride 2, and of transposed ones.

With a row of x as one vector, as conv3_stride2.py has it, and 0 <= k < 3 C,

    dw_u[o, k] = sum_{n, i, j} y[n, i, j, o] x[n, 2 i + u]((2 j - 1) C + k)

where y is the gradient of the result of a strided convolution of x, or the map of a transposed one,
or its ReLU, whose result has the gradient x. A program sums a block of o and of k over its share of
the positions, some rows of a block of columns at a time: a row of y serves three u, a row of x up
to two rows of y. `summed` adds the shares in a fixed order. One launch takes several convolutions
of equal shapes.

Least traffic, in elements: M C_out + 4 M C for M positions of y. Each block of k reads y anew, each
of o x, whose columns are in 1.5 blocks of k each. Arithmetic: 9 M C C_out multiply-adds.
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
    check_like,
    check_product,
    operand,
)
from lgcnet_fast.kernels.conv3 import rectified
from lgcnet_fast.kernels.conv3_backward import _anew
from lgcnet_fast.kernels.conv3_stride2 import small_size
from lgcnet_fast.kernels.launches import INTERPRETED, kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.slabs import pointer_of

RESIDENT = 264
"""Programs, two on each multiprocessor of an H200."""
FEWEST_TILES = 4
"""Of a share, so that there are few to add up."""


@dataclass(frozen=True)
class StridedWeightGradConfig:
    """Of one program: `rows` rows of `block_p` columns of y at a time, of which `stages` are on
    their way, `block_o` by `block_k` sums of each u; `programs` share the positions of a
    convolution."""

    rows: int
    block_p: int
    block_o: int
    block_k: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def default(
        cls, branches: int, shape: Sequence[int], out_channels: int, dtype: torch.dtype
    ) -> StridedWeightGradConfig:
        """Equal shares for up to RESIDENT programs; few sums leave registers for many positions,
        and values of 16 bits shared memory.

        shape: of x, (N, C, H, W).
        """
        images, channels, *size = shape
        height, width = small_size(size)
        block_o = min(64, max(16, triton.next_power_of_2(out_channels)))
        block_k = min(64, max(16, triton.next_power_of_2(3 * channels)))
        block_p = min(256 // dtype.itemsize, max(32, 2**17 // (block_o * block_k)))
        blocks = triton.cdiv(out_channels, block_o) * triton.cdiv(3 * channels, block_k) * branches
        tiles = triton.cdiv(height, 2) * triton.cdiv(images * width, block_p)
        most = min(max(1, RESIDENT // blocks), triton.cdiv(tiles, FEWEST_TILES))
        programs = triton.cdiv(tiles, triton.cdiv(tiles, most))
        return cls(2, block_p, block_o, block_k, warps=4, stages=3, programs=programs)


@kernel(do_not_specialize=["images", "H", "HO", "programs"])
def _strided_weight_grad_kernel(
    y_ptrs, x_ptrs, share_ptr, images, H, W, HO, WO, programs, C: tl.constexpr, CO: tl.constexpr,
    BRANCHES: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th tile of a convolution, for one block of o and k.

    Blocks of the same positions are neighbours in launch order.
    """
    wait_for_predecessor()
    blocks_k = tl.cdiv(3 * C, BLOCK_K)
    blocks = blocks_k * tl.cdiv(CO, BLOCK_O)
    block = tl.program_id(0) % blocks
    k = block % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o = block // blocks_k * BLOCK_O + tl.arange(0, BLOCK_O)
    program = tl.program_id(0) // blocks % programs
    branch = tl.program_id(0) // blocks // programs
    y_ptr = pointer_of(y_ptrs, branch, BRANCHES)
    x_ptr = pointer_of(x_ptrs, branch, BRANCHES)
    segments = tl.cdiv(HO, ROWS)

    sums = ()
    for _ in tl.static_range(3):
        sums = sums + (tl.zeros((BLOCK_O, BLOCK_K), dtype=ACC),)
    tiles = segments * tl.cdiv(images * WO, BLOCK_P)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        first = tile % segments * ROWS
        place = tile // segments * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (place // WO).to(tl.int64)
        column = tl.where(place < images * WO, place % WO, -2)
        y_at = (image * HO * WO + column)[:, None] * CO + o[None, :]
        y_inside = (column >= 0)[:, None] & (o < CO)[None, :]
        place_in_row = ((2 * column - 1) * C)[:, None] + k[None, :]
        x_at = image[:, None] * H * W * C + place_in_row
        # Where there is no column, all of 3 C values begin and end before the row.
        x_inside = (place_in_row >= 0) & (place_in_row < W * C) & (k < 3 * C)[None, :]
        ys = ()
        for i in tl.static_range(ROWS):
            row = first + i
            y = tl.load(
                y_ptr + row * (tl.cast(WO, tl.int64) * CO) + y_at,
                mask=y_inside & (row < HO), other=0.0,
            )  # fmt: skip
            if RELU:
                y = rectified(y)
            ys = ys + (tl.trans(y.to(OPERAND)),)
        for r in tl.static_range(2 * ROWS + 1):
            row = 2 * first + (r - 1)
            x = tl.load(
                x_ptr + row * (tl.cast(W, tl.int64) * C) + x_at,
                mask=x_inside & (row >= 0) & (row < H), other=0.0,
            ).to(OPERAND)  # fmt: skip
            added = ()
            for u in tl.static_range(3):
                value = sums[u]
                # The row of y is i = (r - u) / 2.
                if (r >= u) and ((r - u) % 2 == 0) and ((r - u) // 2 < ROWS):
                    y = ys[(r - u) // 2]
                    value = tl.dot(y, x, value, input_precision="ieee", out_dtype=ACC)
                added = added + (value,)
            sums = added
        if RELU:
            # Its use makes the matrix units finish all products, so that the next tile does not
            # overwrite registers that they still read.
            sums = (sums[0], sums[1], _anew(sums[2]))

    share = share_ptr + (program * BRANCHES + branch).to(tl.int64) * (CO * 9 * C)
    entry = (o * (9 * C))[:, None] + k[None, :]
    for u in tl.static_range(3):
        tl.store(
            share + u * (3 * C) + entry, sums[u], mask=(o < CO)[:, None] & (k < 3 * C)[None, :]
        )


def strided_weight_grad(
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    config: StridedWeightGradConfig | None = None,
    relu: bool = False,
) -> Tensor:
    """The shares (programs, B, C_out, 3, 3, C) of dw, in the accumulator's dtype, for `summed`.

    ys: (N, C_out, ceil(H / 2), ceil(W / 2)), xs: (N, C, H, W), of B convolutions: the gradients of
    strided ones and their maps, or the maps of transposed ones and their gradients; all
    channels_last, of one dtype; relu: the transposed ones are of relu(y). On a GPU channels come in
    whole eights: of 3 to 255 the code that Triton 3.6 makes reads where it must not. float64 is for
    the interpreter only. Raises `ValueError` naming the argument at fault.
    """
    check_maps("ys", ys, ys[0] if len(ys) else None)
    check_maps("xs", xs, xs[0] if len(xs) else None)
    if len(ys) != len(xs):
        raise ValueError(f"ys: {len(ys)} maps, xs: {len(xs)}")
    images, channels, *size = xs[0].shape
    out_channels, small = ys[0].shape[1], small_size(size)
    check_like("ys[0]", ys[0], (images, out_channels, *small), xs[0])
    if ys[0].dtype != xs[0].dtype:
        raise ValueError(f"ys[0]: dtype {ys[0].dtype}, xs[0] has {xs[0].dtype}")
    check_product("xs[0]", xs[0])
    if not INTERPRETED and (channels % 8 or out_channels % 8):
        raise ValueError(f"xs[0]: {channels} channels, ys[0]: {out_channels}, need whole eights")
    branches, storage = len(xs), xs[0].dtype
    config = config or StridedWeightGradConfig.default(branches, xs[0].shape, out_channels, storage)
    shares = xs[0].new_empty(
        (config.programs, branches, out_channels, 3, 3, channels), dtype=accumulator_dtype(storage)
    )
    blocks = triton.cdiv(out_channels, config.block_o) * triton.cdiv(3 * channels, config.block_k)
    _strided_weight_grad_kernel[(branches * config.programs * blocks,)](
        tuple(ys), tuple(xs), shares, images, *size, *small, config.programs,
        C=channels, CO=out_channels, BRANCHES=branches, RELU=relu, ACC=accumulator(storage),
        OPERAND=operand(storage), ROWS=config.rows, BLOCK_P=config.block_p,
        BLOCK_O=config.block_o, BLOCK_K=config.block_k, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return shares

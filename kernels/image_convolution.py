"""3x3 convolutions of images, padding 1, and the gradients of their weights.

For images of up to four channels, a stride s of 1 or 2, and u, v in {-1, 0, 1},

    y[n, i, j, o]   = sum_{u, v, c} w[o, c, u, v] r(x[n, c, s i + u, s j + v])
    dw[o, c, u, v]  = sum_{n, i, j} dy[n, i, j, o] r(x[n, c, s i + u, s j + v])

where what lies outside the image is zero, and r rounds to the dtype of y, as autocast does. Sums
are of float32. The image has no gradient.

Both are products with the matrix of 9 C values around each position, which exists only tile by
tile: positions of a row of y lie next to each other in it, as in images whose channels are planes.
The weights' gradient is summed in two stages: a program sums its share of the tiles, `sum_rows`
adds the shares in a fixed order.

Least traffic: the image as it is given, and y or dy, once each; the up to nine readings of a value
meet in the caches. Arithmetic: 9 C C_out multiply-adds a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    STORAGE,
    accumulator,
    accumulator_dtype,
    check_like,
    check_map,
    empty_map,
    has_matrix_units,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.launches import INTERPRETED, kernel, wait_for_predecessor

MOST_CHANNELS = 4
RESIDENT = 7 * 132
"""Programs of the default tile that an H200 holds at once, for their registers."""


@dataclass(frozen=True)
class ImageConfig:
    """Of one program: `block_p` positions of a row by `block_o` channels of the output."""

    block_p: int
    block_o: int
    warps: int

    @classmethod
    def default(
        cls, channels: int, width: int, out_channels: int, matrix_units: bool
    ) -> ImageConfig:
        """channels: of the image; width: of the output.

        In matrix units a thread loads the surroundings of one position; elsewhere it holds all
        factors of its sums.
        """
        block_o = max(16, triton.next_power_of_2(out_channels))
        if not matrix_units:
            return cls(1024 // block_k(channels), min(16, block_o), 4)
        block_p = min((128, 64), key=lambda block: triton.cdiv(width, block) * block)
        return cls(block_p, min(64, block_o), block_p // 32)


@dataclass(frozen=True)
class ImageWeightGradConfig:
    """As `ImageConfig`; `programs` share the blocks of positions."""

    block_p: int
    block_o: int
    warps: int
    programs: int

    @classmethod
    def default(
        cls, channels: int, shape: Sequence[int], matrix_units: bool
    ) -> ImageWeightGradConfig:
        """Equal shares for as many programs as run at once; shape: (N, C_out, H, W) of dy."""
        images, out_channels, height, width = shape
        tile = ImageConfig.default(channels, width, out_channels, matrix_units)
        most = max(1, RESIDENT // triton.cdiv(out_channels, tile.block_o))
        blocks = images * height * triton.cdiv(width, tile.block_p)
        programs = triton.cdiv(blocks, triton.cdiv(blocks, most))
        return cls(tile.block_p, tile.block_o, tile.warps, programs)


def block_k(channels: int) -> int:
    """Of a tile: the values around a position, up to a power of two that products take."""
    return max(16, triton.next_power_of_2(9 * channels))


@triton.jit
def _surroundings(
    image_ptr, image, row, column, k, H, W, of_image, of_channel, of_row, of_column,
    C: tl.constexpr, STRIDE: tl.constexpr, DTYPE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Of positions of a row of the output, (column, k), for k = (3 u + v) C + c; u, v in 0..2.

    column: (BLOCK_P, 1), so that the lanes of a warp are neighbouring positions and a thread knows
    its k; k: (1, BLOCK_K), where those from 9 C on give zeros.
    """
    u, v, c = k // (3 * C), k // C % 3, k % C
    first_row, first_column = STRIDE * row - 1, STRIDE * column - 1
    i, j = first_row + u, first_column + v
    inside = (k < 9 * C) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    corner_ptr = image_ptr + (image.to(tl.int64) * of_image + first_row.to(tl.int64) * of_row)
    # Within an image 32 bits do, with a fraction of the instructions.
    tap = u * of_row + v * of_column + c * of_channel
    x = tl.load(corner_ptr + (tap + first_column * of_column), mask=inside, other=0.0)
    return x.to(DTYPE).to(OPERAND)


@kernel(do_not_specialize=["HO"])
def _image_convolution_kernel(
    image_ptr, w_ptr, y_ptr, H, W, HO, WO, CO, of_image, of_channel, of_row, of_column,
    w_of_out, w_of_channel, w_of_row, w_of_column,
    C: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a block of a row of y; blocks of the same row are neighbours in launch order."""
    wait_for_predecessor()
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    blocks_o, blocks_p = tl.cdiv(CO, BLOCK_O), tl.cdiv(WO, BLOCK_P)
    program = tl.program_id(0)
    first_o = program % blocks_o * BLOCK_O
    first_p = program // blocks_o % blocks_p * BLOCK_P
    line = program // blocks_o // blocks_p
    k = tl.arange(0, BLOCK_K)
    u, v, c = k // (3 * C), k // C % 3, k % C
    o = first_o + tl.arange(0, BLOCK_O)
    tap = u * w_of_row + v * w_of_column + c * w_of_channel
    w = tl.load(
        w_ptr + (o[None, :] * w_of_out + tap[:, None]),
        mask=(o < CO)[None, :] & (k < 9 * C)[:, None], other=0.0,
    ).to(DTYPE).to(OPERAND)  # fmt: skip
    p = first_p + tl.arange(0, BLOCK_P)
    x = _surroundings(
        image_ptr, line // HO, line % HO, p[:, None], k[None, :], H, W,
        of_image, of_channel, of_row, of_column, C, STRIDE, DTYPE, OPERAND,
    )  # fmt: skip
    y = tl.dot(x, w, input_precision="ieee", out_dtype=ACC)
    place = y_ptr + line.to(tl.int64) * WO * CO + (p[:, None] * CO + o[None, :])
    tl.store(place, y.to(DTYPE), mask=(p < WO)[:, None] & (o < CO)[None, :])


@kernel(do_not_specialize=["images", "HO", "programs"])
def _image_weight_grad_kernel(
    dy_ptr, image_ptr, share_ptr, images, H, W, HO, WO, CO, of_image, of_channel, of_row, of_column,
    programs, C: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th block of positions, for one block of channels of dy."""
    wait_for_predecessor()
    blocks_o, blocks_p = tl.cdiv(CO, BLOCK_O), tl.cdiv(WO, BLOCK_P)
    program = tl.program_id(0) // blocks_o
    k = tl.arange(0, BLOCK_K)
    o = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_K, BLOCK_O), dtype=ACC)
    for block in range(program, images * HO * blocks_p, programs):
        line = block // blocks_p
        p = block % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
        x = _surroundings(
            image_ptr, line // HO, line % HO, p[:, None], k[None, :], H, W,
            of_image, of_channel, of_row, of_column, C, STRIDE, dy_ptr.dtype.element_ty, OPERAND,
        )  # fmt: skip
        place = dy_ptr + line.to(tl.int64) * WO * CO + (p[:, None] * CO + o[None, :])
        g = tl.load(place, mask=(p < WO)[:, None] & (o < CO)[None, :], other=0.0).to(OPERAND)
        total = tl.dot(tl.trans(x), g, total, input_precision="ieee", out_dtype=ACC)
    place = share_ptr + program.to(tl.int64) * CO * 9 * C + (o[None, :] * (9 * C) + k[:, None])
    tl.store(place, total, mask=(k < 9 * C)[:, None] & (o < CO)[None, :])


def serves(channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take images of so many channels, for an output of this dtype."""
    return channels <= MOST_CHANNELS and (INTERPRETED or dtype != torch.float64)


def output_size(size: Sequence[int], stride: int) -> tuple[int, int]:
    """(height, width) of the output; size: those of the image."""
    return triton.cdiv(size[0], stride), triton.cdiv(size[1], stride)


def image_convolution(
    x: Tensor,
    weight: Tensor,
    stride: int,
    dtype: torch.dtype | None = None,
    config: ImageConfig | None = None,
) -> Tensor:
    """y (N, C_out, ceil(H / stride), ceil(W / stride)), channels_last, of `dtype`, or that of x.

    x: (N, C, H, W), weight: (C_out, C, 3, 3), both of any strides and dtype of `STORAGE`. C is at
    most 4, the stride 1 or 2. float64 is for the interpreter only. Raises `ValueError` naming the
    argument at fault.
    """
    dtype = dtype or x.dtype
    _check_image(x, stride, dtype)
    images, channels, height, width = x.shape
    out_channels = len(weight)
    check_like("weight", weight, (out_channels, channels, 3, 3), x)
    size = output_size((height, width), stride)
    y = empty_map((images, out_channels, *size), x.new_empty(0, dtype=dtype))
    matrix_units = has_matrix_units(y)
    config = config or ImageConfig.default(channels, size[1], out_channels, matrix_units)
    blocks = triton.cdiv(size[1], config.block_p) * triton.cdiv(out_channels, config.block_o)
    _image_convolution_kernel[(images * size[0] * blocks,)](
        x, weight, y, height, width, *size, out_channels, *x.stride(), *weight.stride(),
        **_constants(y, channels, stride, config),
    )  # fmt: skip
    return y


def image_weight_grad(
    dy: Tensor, x: Tensor, stride: int, config: ImageWeightGradConfig | None = None
) -> Tensor:
    """dw (C_out, C, 3, 3), channels_last, in the accumulator's dtype.

    dy: the gradient of y, channels_last; x, stride: as for `image_convolution`, where y had the
    dtype of dy. Raises `ValueError` naming the argument at fault.
    """
    check_map("dy", dy)
    _check_image(x, stride, dy.dtype)
    images, channels, height, width = x.shape
    size, out_channels = output_size((height, width), stride), dy.shape[1]
    check_like("dy", dy, (images, out_channels, *size), x)
    matrix_units = has_matrix_units(dy)
    config = config or ImageWeightGradConfig.default(channels, dy.shape, matrix_units)
    shares = dy.new_empty(
        (config.programs, out_channels, 3, 3, channels), dtype=accumulator_dtype(dy.dtype)
    )
    blocks_o = triton.cdiv(out_channels, config.block_o)
    _image_weight_grad_kernel[(config.programs * blocks_o,)](
        dy, x, shares, images, height, width, *size, out_channels, *x.stride(), config.programs,
        **_constants(dy, channels, stride, config),
    )  # fmt: skip
    return sum_rows(shares, block_rows=1024).movedim(-1, 1)


def _constants(
    y: Tensor, channels: int, stride: int, config: ImageConfig | ImageWeightGradConfig
) -> dict[str, Any]:
    """What both kernels are compiled for; y: the output or its gradient."""
    storage = y.dtype
    tile = {"BLOCK_P": config.block_p, "BLOCK_O": config.block_o, "BLOCK_K": block_k(channels)}
    return {
        "C": channels,
        "STRIDE": stride,
        "ACC": accumulator(storage),
        "OPERAND": operand(storage) if has_matrix_units(y) else accumulator(storage),
        **tile,
        "num_warps": config.warps,
        "num_stages": 1,
    }


def _check_image(x: Tensor, stride: int, dtype: torch.dtype) -> None:
    shape = tuple(x.shape)
    if x.ndim != 4 or x.numel() == 0 or x.shape[1] > MOST_CHANNELS:
        raise ValueError(f"x: need images (N, C, H, W) of up to 4 channels, got shape {shape}")
    for name, found in (("x", x.dtype), ("dtype", dtype)):
        if found not in STORAGE:
            raise ValueError(f"{name}: {found} is not one of {', '.join(map(str, STORAGE))}")
    extent = sum(length * step for length, step in zip(shape[1:], x.stride()[1:], strict=True))
    if extent >= 2**31:
        raise ValueError(f"x: images of {shape[1:]} lie across 2^31 values or more")
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride}, need 1 or 2")
    if not serves(x.shape[1], dtype):
        raise ValueError("dtype: float64 is served by Triton's interpreter only")

"""1x1 convolutions of the even and of the odd pixels of an NHWC map, and all their gradients.

For the halves h = 0, 1 with weights w_h of C_h outputs, at the output position (i, j),

    y[n, i, j, h C_0 + o] = sum_c w_h[o, c] x[n, 2 i + h, 2 j + h, c]

where x is zero outside the map. With g = dy,

    dx[n, 2 i + h, 2 j + h, c] = sum_o w_h[o, c] g[n, i, j, h C_0 + o]
    dw_h[o, c] = sum_{n, i, j} g[n, i, j, h C_0 + o] x[n, 2 i + h, 2 j + h, c]

and dx is zero at all other pixels: programs of half h write the zeros at (2 i + h, 2 j + 1 - h). dw
comes in two stages, as in pointwise_backward.py.

Least traffic, in elements, for P pixels of x and Q of y: P C / 2 + Q C_out forward, 3 P C / 2 +
Q C_out backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_dense,
    check_like,
    check_map,
    check_product,
    empty_map,
    has_matrix_units,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.pointwise_backward import MAX_OUT_CHANNELS, ProductGradientsConfig

BLOCK_M, BLOCK_K, WARPS = 64, 64, 4
"""Of the forward kernel: positions and input channels of a tile, warps of a program."""


@triton.jit
def _pixel(position, half, H, W, HO, WO):
    """(index of the pixel that a half reads for an output position, whether it is in the map)."""
    column = 2 * (position % WO) + half
    row = 2 * (position // WO % HO) + half
    image = (position // (WO * HO)).to(tl.int64)
    return (image * H + row) * W + column, (row < H) & (column < W)


@kernel(do_not_specialize=["M"])
def _interleaved_kernel(
    x_ptr, even_ptr, odd_ptr, y_ptr, M, H, W, HO, WO, C, CE, CO,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M output positions of a half; CE of the CO outputs are the even one's."""
    wait_for_predecessor()
    half = tl.program_id(0) % 2
    position = (tl.program_id(0) // 2 * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    pixel, inside = _pixel(position, half, H, W, HO, WO)
    inside = inside & (position < M)
    o = tl.arange(0, BLOCK_O)[None, :]
    outputs = tl.where(half == 0, CE, CO - CE)
    w_ptr = tl.where(half == 0, even_ptr, odd_ptr)
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=ACC)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + pixel * C + k[None, :], mask=inside & (k < C)[None, :], other=0.0)
        mask = (o < outputs) & (k < C)[:, None]
        w = tl.load(w_ptr + o * C + k[:, None], mask=mask, other=0.0)
        total = tl.dot(x.to(OPERAND), w.to(OPERAND), total, input_precision="ieee", out_dtype=ACC)
    y = y_ptr + position.to(tl.int64) * CO + half * CE + o
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=(position < M) & (o < outputs))


@kernel(do_not_specialize=["M", "programs"])
def _interleaved_gradients_kernel(
    dy_ptr, x_ptr, even_ptr, odd_ptr, dx_ptr, share_ptr, M, H, W, HO, WO, C, CE, CO, programs,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th tile of a half, BLOCK_C input channels."""
    wait_for_predecessor()
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    program = tl.program_id(0) // blocks % programs
    half = tl.program_id(0) // blocks // programs
    o = tl.arange(0, BLOCK_O)
    outputs = tl.where(half == 0, CE, CO - CE)
    entry = o[:, None] * C + c
    known = (o < outputs)[:, None] & (c < C)
    w_ptr = tl.where(half == 0, even_ptr, odd_ptr)
    weight = tl.load(w_ptr + entry, mask=known, other=0.0).to(OPERAND)

    total = tl.zeros((BLOCK_O, BLOCK_C), dtype=ACC)
    for first in range(program * BLOCK_M, M, programs * BLOCK_M):
        position = (first + tl.arange(0, BLOCK_M))[:, None]
        pixel, inside = _pixel(position, half, H, W, HO, WO)
        inside = inside & (position < M) & (c < C)
        dy = dy_ptr + position.to(tl.int64) * CO + half * CE + o[None, :]
        g = tl.load(dy, mask=(position < M) & (o < outputs)[None, :], other=0.0).to(OPERAND)
        x = tl.load(x_ptr + pixel * C + c, mask=inside, other=0.0).to(OPERAND)
        total = tl.dot(tl.trans(g), x, total, input_precision="ieee", out_dtype=ACC)
        dx = tl.dot(g, weight, input_precision="ieee", out_dtype=ACC)
        tl.store(dx_ptr + pixel * C + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        # The pixel beside it, in the same row, which no half reads.
        column = 2 * (position % WO) + 1 - half
        row = 2 * (position // WO % HO) + half
        unread = (position < M) & (c < C) & (row < H) & (column < W)
        beside = pixel + (1 - 2 * half)
        tl.store(dx_ptr + beside * C + c, tl.zeros_like(dx).to(dx_ptr.dtype.element_ty), unread)

    share = share_ptr + (program.to(tl.int64) * CO + half * CE) * C
    tl.store(share + entry, total, mask=known)


def serves(x: Tensor, even: Tensor, odd: Tensor) -> bool:
    """Whether these kernels are the way to take for maps like x on their device."""
    return max(len(even), len(odd)) <= MAX_OUT_CHANNELS and has_matrix_units(x)


def interleaved(x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """y: (N, C_0 + C_1, ceil(H / 2), ceil(W / 2)), channels_last, of x's dtype.

    x: (N, C, H, W), channels_last; even: (C_0, C), odd: (C_1, C), contiguous, of x's dtype, up to
    256 outputs each. float64 is for the interpreter only. Raises `ValueError` naming the argument
    at fault.
    """
    shape = _check_arguments(x, even, odd)
    images, outputs, out_height, out_width = shape
    positions = images * out_height * out_width
    y = empty_map(shape, x)
    _interleaved_kernel[(2 * triton.cdiv(positions, BLOCK_M),)](
        x, even, odd, y, positions, *x.shape[2:], out_height, out_width, x.shape[1], len(even),
        outputs,
        ACC=accumulator(x.dtype), OPERAND=operand(x.dtype), BLOCK_M=BLOCK_M,
        BLOCK_K=min(BLOCK_K, max(16, triton.next_power_of_2(x.shape[1]))),
        BLOCK_O=_block_of_outputs(even, odd), num_warps=WARPS,
    )  # fmt: skip
    return y


def interleaved_gradients(
    dy: Tensor,
    x: Tensor,
    even: Tensor,
    odd: Tensor,
    config: ProductGradientsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dx like x, and the shares (programs, C_0 + C_1, C) of dw, even outputs first, in the
    accumulator's dtype, for `summed`.

    dy: like the result of `interleaved`; the others as there. Raises `ValueError` naming the
    argument at fault.
    """
    shape = _check_arguments(x, even, odd)
    check_map("dy", dy)
    check_like("dy", dy, shape, x)
    if dy.dtype != x.dtype:
        raise ValueError(f"dy: dtype {dy.dtype}, but x has {x.dtype}")
    images, outputs, out_height, out_width = shape
    positions, channels = images * out_height * out_width, x.shape[1]
    config = config or ProductGradientsConfig.default(
        2, positions, channels, max(len(even), len(odd)), x.dtype
    )
    dx = empty_map(tuple(x.shape), x)
    shares = x.new_empty((config.programs, outputs, channels), dtype=accumulator_dtype(x.dtype))
    blocks = triton.cdiv(channels, config.block_c)
    _interleaved_gradients_kernel[(2 * config.programs * blocks,)](
        dy, x, even, odd, dx, shares, positions, *x.shape[2:], out_height, out_width, channels,
        len(even), outputs, config.programs,
        ACC=accumulator(x.dtype), OPERAND=operand(x.dtype), BLOCK_M=config.block_m,
        BLOCK_C=config.block_c, BLOCK_O=_block_of_outputs(even, odd),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dx, shares


def summed(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """dw (C_0 + C_1, C) in `dtype`, that of the weights, from the shares of all programs."""
    return sum_rows(shares, dtype=dtype)


def _block_of_outputs(even: Tensor, odd: Tensor) -> int:
    return max(16, triton.next_power_of_2(max(len(even), len(odd))))


def _check_arguments(x: Tensor, even: Tensor, odd: Tensor) -> tuple[int, int, int, int]:
    """The shape of y; raises `ValueError`."""
    check_map("x", x)
    check_product("x", x)
    images, channels, height, width = x.shape
    for name, weight in (("even", even), ("odd", odd)):
        if weight.ndim != 2 or not 1 <= len(weight) <= MAX_OUT_CHANNELS:
            raise ValueError(
                f"{name}: shape {tuple(weight.shape)}, need (1 to {MAX_OUT_CHANNELS}, {channels})"
            )
        check_dense(name, weight, (len(weight), channels), x)
        if weight.dtype != x.dtype:
            raise ValueError(f"{name}: dtype {weight.dtype}, but x has {x.dtype}")
    return images, len(even) + len(odd), -(-height // 2), -(-width // 2)

"""1x1 convolution of the ReLU of a map, with bias, to a few channels; all of its gradients.

With the P positions of an NHWC map as rows of a matrix x,

    y = relu(x) W^T + b,   dx = [x > 0] (dy W),   dW = dy^T relu(x),   db = sum_p dy_p

Sums are of float32 and rounded once. relu(x) is never written. The gradient of the bias is that of
the weight of one more channel, which is 1 everywhere: a tile of x has room for it. dW and db are
summed in two stages: a program sums its share of the positions, `sum_rows` adds the shares in a
fixed order. As in PyTorch, a ReLU passes NaN and its gradient.

Least traffic: x and y once; x, dy and dx once; x and dy once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_like,
    check_map,
    empty_map,
    has_matrix_units,
    operand,
    sum_rows,
)
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor

MOST_CLASSES = 32
MOST_CHANNELS = 255
BLOCK_M, WARPS = 64, 4
"""Positions of a tile."""
RESIDENT = 3 * 132
"""Programs of weight gradients that an H200 holds at once, for their registers."""


def serves(x: Tensor, out_channels: int) -> bool:
    """Whether the kernels take such a map and so many channels of the output."""
    return out_channels <= MOST_CLASSES and x.shape[1] <= MOST_CHANNELS and has_matrix_units(x)


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x).to(x.dtype)


@kernel(do_not_specialize=["positions"])
def _rectified_pointwise_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, positions, C, K, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor()
    m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    inside = (m < positions)[:, None]
    x_mask = inside & (c < C)[None, :]
    x = tl.load(x_ptr + (m[:, None] * C + c[None, :]), mask=x_mask, other=0.0)
    w_mask = (c < C)[:, None] & (k < K)[None, :]
    w = tl.load(weight_ptr + (k[None, :] * C + c[:, None]), mask=w_mask, other=0.0)
    y = tl.dot(_relu(x.to(OPERAND)), w.to(OPERAND), input_precision="ieee", out_dtype=ACC)
    y += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    place = y_ptr + (m[:, None] * K + k[None, :])
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside & (k < K)[None, :])


@kernel(do_not_specialize=["positions"])
def _rectified_pointwise_input_grad_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, positions, C, K, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor()
    m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    inside = (m < positions)[:, None]
    dy = tl.load(dy_ptr + (m[:, None] * K + k[None, :]), mask=inside & (k < K)[None, :], other=0.0)
    w_mask = (k < K)[:, None] & (c < C)[None, :]
    w = tl.load(weight_ptr + (k[:, None] * C + c[None, :]), mask=w_mask, other=0.0)
    place = m[:, None] * C + c[None, :]
    x_mask = inside & (c < C)[None, :]
    x = tl.load(x_ptr + place, mask=x_mask, other=0.0)
    dx = tl.dot(dy.to(OPERAND), w.to(OPERAND), input_precision="ieee", out_dtype=ACC)
    dx = tl.where(x.to(ACC) <= 0, 0.0, dx).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + place, dx, mask=x_mask)


@kernel(do_not_specialize=["positions", "programs"])
def _rectified_pointwise_weight_grad_kernel(
    dy_ptr, x_ptr, share_ptr, positions, C, K, programs, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th block of positions; a share is (K, C + 1)."""
    wait_for_predecessor()
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=ACC)
    for block in range(tl.program_id(0), tl.cdiv(positions, BLOCK_M), programs):
        m = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        dy = tl.load(
            dy_ptr + (m[None, :] * K + k[:, None]),
            mask=(k < K)[:, None] & (m < positions)[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + (m[:, None] * C + c[None, :]),
            mask=(m < positions)[:, None] & (c < C)[None, :], other=0.0,
        )  # fmt: skip
        x = tl.where((c == C)[None, :], 1.0, _relu(x.to(OPERAND))).to(OPERAND)
        total = tl.dot(dy.to(OPERAND), x, total, input_precision="ieee", out_dtype=ACC)
    place = share_ptr + tl.program_id(0) * K * (C + 1) + (k[:, None] * (C + 1) + c[None, :])
    tl.store(place, total, mask=(k < K)[:, None] & (c <= C)[None, :])


def rectified_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y (N, K, H, W), channels_last, of the dtype of x.

    x: (N, C, H, W), channels_last; weight: (K, C) and bias: (K,), contiguous, which enter in the
    dtype of x and in their own. K is at most 32, C at most 255. float64 is for the interpreter
    only. Raises `ValueError` naming the argument at fault.
    """
    check_map("x", x)
    channels, classes = _checked(x, weight)
    check_like("bias", bias, (classes,), x)
    positions = x.numel() // channels
    y = empty_map((len(x), classes, *x.shape[2:]), x)
    _rectified_pointwise_kernel[(triton.cdiv(positions, BLOCK_M),)](
        x, weight, bias, y, positions, channels, classes, **_constants(x, channels, classes)
    )
    return y


def rectified_pointwise_input_grad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dx, like x. dy: (N, K, H, W), like y; x, weight: as for `rectified_pointwise`."""
    channels, classes = _checked(x, weight)
    _check_gradient(dy, x, classes)
    positions = x.numel() // channels
    dx = empty_map(tuple(x.shape), x)
    _rectified_pointwise_input_grad_kernel[(triton.cdiv(positions, BLOCK_M),)](
        dy, x, weight, dx, positions, channels, classes, **_constants(x, channels, classes)
    )
    return dx


def rectified_pointwise_weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """(K, C + 1) in the accumulator's dtype: dW, and db behind it.

    dy, x: as for `rectified_pointwise_input_grad`.
    """
    classes = dy.shape[1]
    _check_gradient(dy, x, classes)
    channels = x.shape[1]
    positions = x.numel() // channels
    programs = min(RESIDENT, triton.cdiv(positions, BLOCK_M))
    shares = x.new_empty(programs, classes, channels + 1, dtype=accumulator_dtype(x.dtype))
    _rectified_pointwise_weight_grad_kernel[(programs,)](
        dy, x, shares, positions, channels, classes, programs,
        **_constants(x, channels + 1, classes),
    )  # fmt: skip
    return sum_rows(shares)


def _constants(x: Tensor, channels: int, classes: int) -> dict[str, object]:
    return {
        "ACC": accumulator(x.dtype),
        "OPERAND": operand(x.dtype),
        "BLOCK_M": BLOCK_M,
        "BLOCK_C": max(16, triton.next_power_of_2(channels)),
        "BLOCK_K": max(16, triton.next_power_of_2(classes)),
        "num_warps": WARPS,
    }


def _checked(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """(channels, channels of the output)."""
    classes, channels = len(weight), x.shape[1]
    check_like("weight", weight, (classes, channels), x)
    if not weight.is_contiguous():
        raise ValueError(f"weight: strides {weight.stride()}, need a contiguous tensor")
    if not serves(x, classes):
        raise ValueError(f"x: {channels} channels of {x.dtype} to {classes} are not served")
    return channels, classes


def _check_gradient(dy: Tensor, x: Tensor, classes: int) -> None:
    for name, tensor in (("dy", dy), ("x", x)):
        check_map(name, tensor)
    check_like("dy", dy, (len(x), classes, *x.shape[2:]), x)
    if dy.dtype != x.dtype:
        raise ValueError(f"dy: dtype {dy.dtype}, need {x.dtype}")

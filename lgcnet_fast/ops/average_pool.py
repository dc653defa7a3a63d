"""Average pooling to k x k bins: the candidates `gp1`, `gp2` and `gp5` up to their convolution.

The fused form is a product with a constant matrix. In NHWC memory PyTorch's own kernel gives each
image to one block of threads, so that most of a GPU idles.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.constants import made_once
from lgcnet_fast.ops.maps import dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.operands import check_map

ALIGNMENT = 8
"""Fast kernels for tensor cores take matrices whose sides are multiples of it."""


def average_pool(x: Tensor, bins: int) -> Tensor:
    """(N, C, H, W) -> (N, C, bins, bins), the means of windows, as `F.adaptive_avg_pool2d`.

    Window i of a side of n positions begins at floor(i n / bins) and ends in front of
    ceil((i + 1) n / bins), so that windows overlap where bins does not divide n.

    The fused form adds up in float32 and keeps nothing for the backward pass.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("x", x)
    if bins < 1:
        raise OperandError(f"bins: {bins}, need at least 1")
    result: Tensor = _operation(x, bins)
    return result


class _Windows(NamedTuple):
    """The mean over window i is scale_i sum_p members_ip x_p."""

    members: Tensor
    """(padded, H W), of 0 and of one power of two, which is at most 1 / the largest area, so that
    no sum overflows in half precision. Padded with empty windows to a multiple of ALIGNMENT."""
    scale: Tensor
    """(bins^2, 1), float32 or float64."""


class _AveragePool(torch.autograd.Function):
    """Products with out=, because autocast would round the operands of others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bins: int) -> Tensor:
        ctx.shape, ctx.bins = x.shape, bins
        images, channels, *_ = x.shape
        members, scale = _windows_of(x, x.shape, bins)
        sums = x.new_empty(images, len(members), channels)
        torch.bmm(members.expand(images, -1, -1), _positions_first(x), out=sums)
        pooled = x.new_empty(images, bins * bins, channels)
        torch.mul(sums[:, : len(scale)], scale, out=pooled)
        return pooled.unflatten(1, (bins, bins)).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        members, scale = _windows_of(gradient, ctx.shape, ctx.bins)
        by_window = _positions_first(gradient)
        scaled = gradient.new_zeros(len(by_window), len(members), by_window.shape[-1])
        torch.mul(by_window, scale, out=scaled[:, : len(scale)])
        dx = empty_nhwc(gradient, ctx.shape)
        torch.bmm(members.T.expand(len(dx), -1, -1), scaled, out=_positions_first(dx))
        return dx, None


class _Mean(torch.autograd.Function):
    """A single window: the gradient is dense NHWC memory, as those beside which it is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.adaptive_avg_pool2d(x, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        dx = empty_nhwc(gradient, ctx.shape)
        *_, height, width = ctx.shape
        return torch.mul(gradient.expand(ctx.shape), 1 / (height * width), out=dx)


def _positions_first(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H W, C), which is the memory of an NHWC map."""
    return nhwc(x).movedim(1, -1).flatten(1, 2)


def _windows_of(x: Tensor, shape: torch.Size, bins: int) -> _Windows:
    return made_once(_windows, *shape[2:], bins, x.dtype, x.device)


def _windows(
    height: int, width: int, bins: int, dtype: torch.dtype, device: torch.device
) -> _Windows:
    windows = list(product(_sides(height, bins), _sides(width, bins)))
    areas = [len(rows) * len(columns) for rows, columns in windows]
    member = 2.0 ** -(max(areas) - 1).bit_length()
    padded = -(-len(windows) // ALIGNMENT) * ALIGNMENT
    by_position = torch.zeros(height, width, padded, dtype=dtype)
    for index, (rows, columns) in enumerate(windows):
        by_position[rows.start : rows.stop, columns.start : columns.stop, index] = member
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([[1 / (member * area)] for area in areas], dtype=accumulator)
    return _Windows(by_position.flatten(0, 1).to(device).T, scale.to(device))


def _sides(length: int, bins: int) -> list[range]:
    """The windows along an axis."""
    return [range(i * length // bins, -(-(i + 1) * length // bins)) for i in range(bins)]


def _reference(x: Tensor, bins: int) -> Tensor:
    return F.adaptive_avg_pool2d(x, bins)


def _run(x: Tensor, bins: int) -> Tensor:
    result: Tensor = _Mean.apply(x) if bins == 1 else _AveragePool.apply(x, bins)
    return result


_form = Implementation(_run, lambda x, bins: dtype_refusal("x", x))
_operation = Operation(
    "average_pool", _reference, triton=_form, cuda=_form, tuned_as="separable_branches"
)

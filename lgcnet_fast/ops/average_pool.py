"""Average pooling to k x k bins: the candidates `gp1`, `gp2` and `gp5` up to their convolution.

In NHWC memory PyTorch's own kernel gives each image to one block of threads, so that most of a GPU
idles. Triton kernels pool to several numbers of bins at once; the backend `cuda`, whose extension
has none for it, multiplies with a constant matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.constants import made_once
from lgcnet_fast.ops.maps import accumulator, dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.operands import check_map

ALIGNMENT = 8
"""Fast kernels for tensor cores take matrices whose sides are multiples of it."""


def average_pool(x: Tensor, bins: int) -> Tensor:
    """As `average_pools`, to one number of bins."""
    return average_pools(x, (bins,))[0]


def average_pools(x: Tensor, bins: Sequence[int], relu: bool = False) -> list[Tensor]:
    """(N, C, H, W) -> (N, C, b, b) for each b of bins, the means of windows; of relu(x) if `relu`.

    As `F.adaptive_avg_pool2d`: window i of a side of n positions begins at floor(i n / b) and ends
    in front of ceil((i + 1) n / b), so that windows overlap where b does not divide n.

    The fused form adds up in float32, keeps nothing but x of a ReLU for the backward pass, and
    finds the gradient of x through all of them together. Triton's kernels rectify what they load.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("x", x)
    for count in bins:
        if count < 1:
            raise OperandError(f"bins: {count}, need at least 1")
    result: list[Tensor] = _operation(x, tuple(bins), relu)
    return result


class _AveragePools(torch.autograd.Function):
    """By the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bins: tuple[int, ...], relu: bool) -> tuple[Tensor, ...]:
        x = nhwc(x)
        ctx.shape, ctx.bins = x.shape, bins
        ctx.save_for_backward(*([x] if relu else []))
        images, channels, *_ = x.shape
        means = _average_pools(x, bins, relu)
        sizes = [images * count * count * channels for count in bins]
        return tuple(
            part.view(images, count, count, channels).movedim(-1, 1)
            for part, count in zip(means.split(sizes), bins, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        together = torch.cat([_positions_first(g).flatten() for g in gradients])
        rectified = ctx.saved_tensors[0] if ctx.saved_tensors else None
        return _average_pools_backward(together, ctx.shape, ctx.bins, rectified), None, None


@custom_op("lgcnet_fast::average_pools", mutates_args=())
def _average_pools(x: Tensor, bins: Sequence[int], relu: bool) -> Tensor:
    """The means to every number of bins, one vector: (N, b, b, C) behind one another."""
    from lgcnet_fast.kernels.average_pool import PoolWindows, average_pools_forward

    windows = made_once(PoolWindows.of, *x.shape[2:], tuple(bins), x.device)
    return average_pools_forward(x, windows, relu)


@_average_pools.register_fake
def _(x: Tensor, bins: Sequence[int], relu: bool) -> Tensor:
    return x.new_empty(x.shape[0] * x.shape[1] * sum(count * count for count in bins))


@custom_op("lgcnet_fast::average_pools_backward", mutates_args=())
def _average_pools_backward(
    gradient: Tensor, shape: Sequence[int], bins: Sequence[int], rectified: Tensor | None
) -> Tensor:
    """The gradient of x, shaped (N, C, H, W), from that of the vector; rectified: x of a ReLU."""
    from lgcnet_fast.kernels.average_pool import average_pools_backward

    return average_pools_backward(gradient, shape, bins, x=rectified)


@_average_pools_backward.register_fake
def _(
    gradient: Tensor, shape: Sequence[int], bins: Sequence[int], rectified: Tensor | None
) -> Tensor:
    return empty_nhwc(gradient, shape)


class _Windows(NamedTuple):
    """The mean over window i is scale_i sum_p members_ip x_p."""

    members: Tensor
    """(padded, H W), of 0 and of one power of two, which is at most 1 / the largest area, so that
    no sum overflows in half precision. Padded with empty windows to a multiple of ALIGNMENT."""
    scale: Tensor
    """(bins^2, 1), float32 or float64."""


class _Product(torch.autograd.Function):
    """With a constant matrix. With out=, because autocast would round the operands of others."""

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
    scale = torch.tensor([[1 / (member * area)] for area in areas], dtype=accumulator(dtype))
    return _Windows(by_position.flatten(0, 1).to(device).T, scale.to(device))


def _sides(length: int, bins: int) -> list[range]:
    """The windows along an axis."""
    return [range(i * length // bins, -(-(i + 1) * length // bins)) for i in range(bins)]


def _reference(x: Tensor, bins: tuple[int, ...], relu: bool) -> list[Tensor]:
    x = F.relu(x) if relu else x
    return [F.adaptive_avg_pool2d(x, count) for count in bins]


def _run(x: Tensor, bins: tuple[int, ...], relu: bool) -> list[Tensor]:
    return list(_AveragePools.apply(x, bins, relu))


def _run_products(x: Tensor, bins: tuple[int, ...], relu: bool) -> list[Tensor]:
    x = F.relu(x) if relu else x
    return [_Mean.apply(x) if count == 1 else _Product.apply(x, count) for count in bins]


def _refuse(x: Tensor, bins: tuple[int, ...], relu: bool) -> str | None:
    return dtype_refusal("x", x)


_operation = Operation(
    "average_pool",
    _reference,
    triton=Implementation(_run, _refuse),
    cuda=Implementation(_run_products, _refuse),
    tuned_as="separable_branches",
)

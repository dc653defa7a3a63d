"""3x3 convolutions of stride 2 and transposed ones by Triton's kernels, or else by torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.ops.lanes import side_by_side
from lgcnet_fast.ops.maps import empty_nhwc, nhwc
from lgcnet_fast.ops.pointwise_kernels import convolution_gradient

GEOMETRY = (2, 1, 1)
"""Stride, padding and dilation."""
ARGUMENTS = (*([length] * 2 for length in GEOMETRY), False, [0, 0], 1)
"""What torch's convolution takes after the bias."""


def suits(x: Tensor, weight: Tensor, geometry: tuple[int, int, int]) -> bool:
    """Whether these shall take the convolution under the backend `triton`."""
    from lgcnet_fast.kernels.conv3_stride2 import fits

    return tuple(geometry) == GEOMETRY and fits(x, weight)


@custom_op(
    "lgcnet_fast::strided_convolutions",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor? mask=None) -> Tensor[]",
)
def strided_convolutions_forward(
    x: Tensor, weights: Sequence[Tensor], mask: Tensor | None = None
) -> list[Tensor]:
    """(N, C, H, W) -> (N, C_out, ceil(H / 2), ceil(W / 2)) with every weight, (C_out, C, 3, 3).

    x: NHWC; weights: of one shape; mask: like a result, which is zero where it is not positive.
    """
    from lgcnet_fast.kernels import conv3_stride2 as kernel

    if kernel.serves(x, weights[0]):
        return kernel.strided_convolutions(x, [nhwc(weight) for weight in weights], mask=mask)
    convolution = torch.ops.aten.convolution
    jobs = [partial(convolution, x, weight, None, *ARGUMENTS) for weight in weights]
    ys = side_by_side(x.device, jobs)
    if mask is not None:
        ys = [torch.ops.aten.threshold_backward(y, mask, 0) for y in ys]
    return [nhwc(y) for y in ys]


@strided_convolutions_forward.register_fake
def _(x: Tensor, weights: Sequence[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    height, width = (-(-length // 2) for length in x.shape[2:])
    return [empty_nhwc(x, (len(x), len(weight), height, width)) for weight in weights]


@custom_op(
    "lgcnet_fast::transposed_convolutions",
    mutates_args=(),
    schema="(Tensor[] ys, Tensor[] weights, SymInt[] size, bool relu=False) -> Tensor",
)
def transposed_convolutions(
    ys: Sequence[Tensor], weights: Sequence[Tensor], size: Sequence[int], relu: bool = False
) -> Tensor:
    """(N, C, *size), the sum of the transposed convolutions of all ys, or the gradient of x in
    `strided_convolutions_forward`, whose results have these.

    ys: NHWC; relu: the sum is of relu(y).
    """
    from lgcnet_fast.kernels import conv3_stride2 as kernel

    if kernel.serves(ys[0], weights[0]):
        return kernel.transposed_convolutions(
            ys, [nhwc(weight) for weight in weights], size, relu=relu
        )
    if relu:
        ys = [F.relu(y) for y in ys]
    arguments = (*ARGUMENTS[:3], True, [1 - length % 2 for length in size], 1)
    convolution = torch.ops.aten.convolution
    pairs = zip(ys, weights, strict=True)
    jobs = [partial(convolution, y, weight, None, *arguments) for y, weight in pairs]
    return nhwc(reduce(torch.add, side_by_side(ys[0].device, jobs)))


@transposed_convolutions.register_fake
def _(
    ys: Sequence[Tensor], weights: Sequence[Tensor], size: Sequence[int], relu: bool = False
) -> Tensor:
    return empty_nhwc(ys[0], (len(ys[0]), weights[0].shape[1], *size))


@custom_op(
    "lgcnet_fast::strided_weight_gradients",
    mutates_args=(),
    schema="(Tensor[] ys, Tensor[] xs, Tensor[] weights, bool relu=False) -> Tensor",
)
def strided_weight_gradients(
    ys: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], relu: bool = False
) -> Tensor:
    """(B, C_out, C, 3, 3), each channels_last, in the dtype of the weights.

    Of B convolutions of equal shapes: of strided ones of xs, whose results have the gradients ys,
    or of transposed ones of ys, or with `relu` of relu(y), whose results have the gradients xs; all
    NHWC.
    """
    from lgcnet_fast.kernels import conv3_stride2 as kernel
    from lgcnet_fast.kernels import conv3_stride2_backward as backward
    from lgcnet_fast.kernels.conv3_backward import summed

    if kernel.serves(xs[0], weights[0]):
        return summed(backward.strided_weight_grad(ys, xs, relu=relu), weights[0].dtype)
    if relu:
        ys = [F.relu(y) for y in ys]
    out = _empty(weights)
    jobs = [
        partial(convolution_gradient, 1, *one, ARGUMENTS)
        for one in zip(ys, xs, weights, strict=True)
    ]
    for place, found in zip(out, side_by_side(xs[0].device, jobs), strict=True):
        place.copy_(found)
    return out


@strided_weight_gradients.register_fake
def _(
    ys: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], relu: bool = False
) -> Tensor:
    return _empty(weights)


def _empty(weights: Sequence[Tensor]) -> Tensor:
    return empty_nhwc(weights[0], (len(weights), *weights[0].shape))

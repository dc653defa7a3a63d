"""3x3 convolutions of stride 2 and transposed ones by Triton's kernels, or else by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

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


@custom_op("lgcnet_fast::strided_convolution", mutates_args=())
def strided_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C_out, ceil(H / 2), ceil(W / 2)); x: NHWC; weight: (C_out, C, 3, 3)."""
    from lgcnet_fast.kernels import conv3_stride2 as kernel

    if kernel.serves(x, weight):
        return kernel.strided_convolution(x, nhwc(weight))
    return nhwc(torch.ops.aten.convolution(x, weight, None, *ARGUMENTS))


@strided_convolution.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    height, width = (-(-length // 2) for length in x.shape[2:])
    return empty_nhwc(x, (len(x), len(weight), height, width))


@custom_op("lgcnet_fast::transposed_convolution", mutates_args=())
def transposed_convolution(y: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, *size), the gradient of x in `strided_convolution`; y: that of its result, NHWC."""
    from lgcnet_fast.kernels import conv3_stride2 as kernel

    if kernel.serves(y, weight):
        return kernel.transposed_convolution(y, nhwc(weight), size)
    beyond = [1 - length % 2 for length in size]
    arguments = (*ARGUMENTS[:3], True, beyond, 1)
    return nhwc(torch.ops.aten.convolution(y, weight, None, *arguments))


@transposed_convolution.register_fake
def _(y: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    return empty_nhwc(y, (len(y), weight.shape[1], *size))


@custom_op("lgcnet_fast::strided_weight_gradient", mutates_args=())
def strided_weight_gradient(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """(C_out, C, 3, 3), channels_last, in the dtype of the weight.

    Of `strided_convolution`, where y is the gradient of its result, or of `transposed_convolution`,
    where x is; both NHWC.
    """
    from lgcnet_fast.kernels import conv3_stride2 as kernel
    from lgcnet_fast.kernels import conv3_stride2_backward as backward
    from lgcnet_fast.kernels.conv3_backward import summed

    if kernel.serves(x, weight):
        return summed(backward.strided_weight_grad(y, x), weight.dtype)[0]
    return nhwc(convolution_gradient(1, y, x, weight, ARGUMENTS)).to(weight.dtype)


@strided_weight_gradient.register_fake
def _(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return empty_nhwc(weight, weight.shape)

"""The convolution that a network begins with: Triton's kernels read the image as it is given."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, empty_nhwc, nhwc


def suits(x: Tensor, weight: Tensor, geometry: tuple[int, int, int]) -> bool:
    """Whether `image_convolution` shall take this convolution under the backend `triton`.

    geometry: stride, padding and dilation.
    """
    from lgcnet_fast.kernels import image_convolution as kernel

    stride, *others = geometry
    if x.requires_grad or weight.shape[2:] != (3, 3) or stride > 2 or others != [1, 1]:
        return False
    return kernel.serves(x.shape[1], computed_dtype(x))


def image_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """As `convolutions` of one map, which `suits`; keeps the image and the weight.

    Under autocast the kernels round the image's values themselves.
    """
    y: Tensor = _ImageConvolution.apply(x, weight.to(computed_dtype(x)), stride)
    return y


class _ImageConvolution(torch.autograd.Function):
    """The weight has the dtype of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.owners = stride, gradient_owners([weight])
        return _forward(x, weight, stride)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        x, weight = ctx.saved_tensors
        job = partial(_weight_gradient, nhwc(gradient), x, weight, ctx.stride)
        (found,) = side_by_side(x.device, [], [job])
        settle(x.device, ctx.owners)
        return None, found, None


@custom_op("lgcnet_fast::image_convolution", mutates_args=())
def _forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """NHWC, of the dtype of the weight."""
    from lgcnet_fast.kernels import image_convolution as kernel

    return kernel.image_convolution(x, weight, stride, weight.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    height, width = (-(-length // stride) for length in x.shape[2:])
    return empty_nhwc(weight, (len(x), len(weight), height, width))


@custom_op("lgcnet_fast::image_weight_gradient", mutates_args=())
def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """As the weight lies in memory, in its dtype, so that autograd need not copy it.

    g: NHWC.
    """
    from lgcnet_fast.kernels import image_convolution as kernel

    dw = kernel.image_weight_grad(g, x, stride)
    if (dw.dtype, dw.stride()) == (weight.dtype, weight.stride()):
        return dw
    return torch.empty_like(weight).copy_(dw)


@_weight_gradient.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return torch.empty_like(weight)

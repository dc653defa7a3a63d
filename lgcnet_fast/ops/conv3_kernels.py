"""The weight gradients of plain 3x3 convolutions: Triton's kernel with tuned tiles, or torch's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.lanes import side_by_side
from lgcnet_fast.ops.maps import accumulator
from lgcnet_fast.ops.pointwise_kernels import convolution_gradient
from lgcnet_fast.ops.tuning import shape_key, tuned

GEOMETRY = (1, 1, 1)
"""Stride, padding and dilation."""


def suits(x: Tensor, weight: Tensor, geometry: tuple[int, int, int]) -> bool:
    """Whether `conv3_weight_gradients` shall take this convolution under the backend `triton`."""
    from lgcnet_fast.kernels import conv3_backward as kernel

    if weight.shape[2:] != (3, 3) or tuple(geometry) != GEOMETRY:
        return False
    return kernel.fits(x, len(weight))


@custom_op(
    "lgcnet_fast::conv3_weight_gradients",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor[] xs, Tensor[] weights) -> Tensor",
)
def conv3_weight_gradients(
    gs: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """Of B 3x3 convolutions of equal shapes, stride 1, padding 1: (B, C_out, C, 3, 3).

    gs, xs: NHWC. Each gradient is channels_last, in the accumulator's dtype.
    """
    from lgcnet_fast.kernels import conv3_backward as kernel

    x, out_channels = xs[0], len(weights[0])
    if kernel.serves(x, out_channels):
        default = kernel.WeightGradConfig.default(len(xs), x.shape, out_channels)
        key = shape_key(x.dtype, x.shape, (len(xs), out_channels))
        config = tuned(default, "conv3_weight_grad", key, x.device)
        return kernel.summed(kernel.conv3_weight_grad(gs, xs, config))
    arguments = (*([length] * 2 for length in GEOMETRY), False, [0, 0], 1)
    jobs = [
        partial(convolution_gradient, 1, *one, arguments)
        for one in zip(gs, xs, weights, strict=True)
    ]
    out = _empty(weights, x)
    for place, found in zip(out, side_by_side(x.device, jobs), strict=True):
        place.copy_(found)
    return out


@conv3_weight_gradients.register_fake
def _(gs: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return _empty(weights, xs[0])


def _empty(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    out_channels, channels = weights[0].shape[:2]
    shape = (len(weights), out_channels, 3, 3, channels)
    return x.new_empty(shape, dtype=accumulator(x.dtype)).movedim(-1, 2)

"""3x3 convolutions by Triton's kernels with tuned tiles; weight gradients also by torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.ops.backend import supposing
from lgcnet_fast.ops.lanes import side_by_side
from lgcnet_fast.ops.maps import empty_nhwc, nhwc
from lgcnet_fast.ops.pointwise_kernels import convolution_gradient
from lgcnet_fast.ops.tuning import shape_key, tuned

GEOMETRY = (1, 1, 1)
"""Stride, padding and dilation."""
FEW_CHANNELS = 64
"""Up to which the kernels win although nobody rectifies: library tiles are half empty."""


def suits(x: Tensor, weight: Tensor, geometry: tuple[int, int, int]) -> bool:
    """Whether `conv3_weight_gradients` shall take this convolution under the backend `triton`."""
    from lgcnet_fast.kernels.conv3 import fits

    if weight.shape[2:] != (3, 3) or tuple(geometry) != GEOMETRY:
        return False
    return fits(x, len(weight))


def suits_all(x: Tensor, weight: Tensor, geometry: tuple[int, int, int]) -> bool:
    """Whether `conv3_results` and `conv3_input_gradient` shall take it as well."""
    from lgcnet_fast.kernels.conv3 import serves

    if max(weight.shape[:2]) > FEW_CHANNELS or not suits(x, weight, geometry):
        return False
    return supposing() or serves(x, len(weight))


@custom_op(
    "lgcnet_fast::conv3_weight_gradients",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor[] xs, Tensor[] weights, bool relu=False) -> Tensor",
)
def conv3_weight_gradients(
    gs: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], relu: bool = False
) -> Tensor:
    """Of B 3x3 convolutions of equal shapes, stride 1, padding 1: (B, C_out, C, 3, 3).

    gs, xs: NHWC; relu: the convolutions are of relu(x). Each gradient is channels_last, in the
    dtype of the weights.
    """
    from lgcnet_fast.kernels import conv3
    from lgcnet_fast.kernels import conv3_backward as kernel
    from lgcnet_fast.native import conv3_weight_gradient as native

    x, out_channels = xs[0], len(weights[0])
    if native.refusal(gs, xs) is None:
        return kernel.summed(native.conv3_weight_gradient(gs, xs, relu=relu), weights[0].dtype)
    if conv3.serves(x, out_channels):
        default = kernel.WeightGradConfig.default(len(xs), x.shape, out_channels)
        config = tuned(default, "conv3_weight_grad", _key(x, weights), x.device)
        shares = kernel.conv3_weight_grad(gs, xs, relu, config)
        return kernel.summed(shares, weights[0].dtype)
    arguments = (*([length] * 2 for length in GEOMETRY), False, [0, 0], 1)
    if relu:
        xs = [F.relu(x) for x in xs]
    jobs = [
        partial(convolution_gradient, 1, *one, arguments)
        for one in zip(gs, xs, weights, strict=True)
    ]
    out = _empty(weights)
    for place, found in zip(out, side_by_side(x.device, jobs), strict=True):
        place.copy_(found)
    return out


@conv3_weight_gradients.register_fake
def _(
    gs: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], relu: bool = False
) -> Tensor:
    return _empty(weights)


def _empty(weights: Sequence[Tensor]) -> Tensor:
    return empty_nhwc(weights[0], (len(weights), *weights[0].shape))


@custom_op(
    "lgcnet_fast::conv3_results",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, bool relu=False) -> Tensor[]",
)
def conv3_results(x: Tensor, weights: Sequence[Tensor], relu: bool = False) -> list[Tensor]:
    """3x3 convolutions of x or relu(x), stride 1, padding 1; x: NHWC; weights: of one shape."""
    from lgcnet_fast.kernels import conv3 as kernel
    from lgcnet_fast.kernels import conv3_walk

    weights = [nhwc(weight) for weight in weights]
    if len(weights) == 1 and conv3_walk.walks(x):
        return [conv3_walk.conv3_walk(x, weights[0], relu)]
    out_channels, channels = weights[0].shape[:2]
    default = kernel.Conv3Config.default(x.shape, channels, out_channels, x.dtype, len(weights))
    config = tuned(default, "conv3_forward", _key(x, weights), x.device)
    return kernel.conv3_forward(x, weights, relu, config)


@conv3_results.register_fake
def _(x: Tensor, weights: Sequence[Tensor], relu: bool = False) -> list[Tensor]:
    images, _, height, width = x.shape
    return [empty_nhwc(x, (images, len(weight), height, width)) for weight in weights]


@custom_op(
    "lgcnet_fast::conv3_input_gradient",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor x, Tensor[] weights, bool relu=False) -> Tensor",
)
def conv3_input_gradient(
    gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], relu: bool = False
) -> Tensor:
    """Of x, from those of all `conv3_results`; gs: NHWC, like x."""
    from lgcnet_fast.kernels import conv3 as kernel
    from lgcnet_fast.kernels import conv3_walk

    weights = [nhwc(weight) for weight in weights]
    if len(weights) == 1 and conv3_walk.walks(gs[0]):
        return conv3_walk.conv3_walk_input_grad(gs[0], x, weights[0], relu)
    out_channels, channels = weights[0].shape[:2]
    default = kernel.Conv3Config.default(x.shape, out_channels, channels, x.dtype)
    config = tuned(default, "conv3_input_grad", _key(x, weights), x.device)
    return kernel.conv3_input_grad(gs, x, weights, relu, config)


@conv3_input_gradient.register_fake
def _(gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], relu: bool = False) -> Tensor:
    return empty_nhwc(x, x.shape)


def _key(x: Tensor, weights: Sequence[Tensor]) -> str:
    return shape_key(x.dtype, x.shape, (len(weights), len(weights[0])))

"""3x3 convolutions by Triton's kernels with tuned tiles, or by those of `cuda` in float32; weight
gradients also by torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
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
MANY_CHANNELS = 128
"""From which cuDNN finds weights' gradients in float32 with fewer multiplications, by Winograd."""


def suits(backend: str, x: Tensor, weight: Tensor, geometry: tuple[int, int, int]) -> bool:
    """Whether `conv3_weight_gradients` shall take this convolution."""
    from lgcnet_fast.kernels.conv3 import fits

    if weight.shape[2:] != (3, 3) or tuple(geometry) != GEOMETRY:
        return False
    if backend == "cuda":
        return _sums_suit(x, len(weight))
    return fits(x, len(weight))


def _sums_suit(x: Tensor, out_channels: int) -> bool:
    """Whether the kernel of `cuda` for weights' gradients shall serve."""
    from lgcnet_fast.native import conv3_weight_sums as native

    few = min(x.shape[1], out_channels) < MANY_CHANNELS
    return few and native.refusal(x.dtype, x.shape, out_channels) is None


def suits_all(backend: str, x: Tensor, weight: Tensor, geometry: tuple[int, int, int]) -> bool:
    """Whether `conv3_results` and `conv3_input_gradient` shall take it."""
    from lgcnet_fast.kernels.conv3 import serves
    from lgcnet_fast.native import conv3 as native

    if backend == "cuda":
        of_geometry = weight.shape[2:] == (3, 3) and tuple(geometry) == GEOMETRY
        return of_geometry and native.refusal(x.dtype, x.shape, len(weight)) is None
    if max(weight.shape[:2]) > FEW_CHANNELS or not suits(backend, x, weight, geometry):
        return False
    return supposing() or serves(x, len(weight))


@custom_op(
    "lgcnet_fast::conv3_weight_gradients",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor[] xs, Tensor[] weights, str backend, bool relu=False) -> Tensor",
)
def conv3_weight_gradients(
    gs: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    backend: str,
    relu: bool = False,
) -> Tensor:
    """Of B 3x3 convolutions of equal shapes, stride 1, padding 1: (B, C_out, C, 3, 3).

    gs, xs: NHWC; relu: the convolutions are of relu(x). Each gradient is channels_last, in the
    dtype of the weights.
    """
    from lgcnet_fast.kernels import conv3
    from lgcnet_fast.kernels import conv3_backward as kernel
    from lgcnet_fast.native import conv3_weight_gradient as native

    x, out_channels = xs[0], len(weights[0])
    if backend == "cuda":
        if _sums_suit(x, out_channels):
            return _weight_gradients_in_float32(gs, xs, relu)
    elif native.refusal(gs, xs) is None:
        return kernel.summed(native.conv3_weight_gradient(gs, xs, relu=relu), weights[0].dtype)
    elif conv3.serves(x, out_channels):
        default = kernel.WeightGradConfig.default(len(xs), x.shape, out_channels)
        config = tuned(default, "conv3_weight_grad", _key(x, weights), x.device)
        shares = kernel.conv3_weight_grad(gs, xs, relu, config)
        return kernel.summed(shares, weights[0].dtype)
    arguments = (*([length] * 2 for length in GEOMETRY), False, [0, 0], 1)
    if relu:
        rectified = {x.data_ptr(): x for x in xs}  # most often one
        rectified = {address: F.relu(x) for address, x in rectified.items()}
        xs = [rectified[x.data_ptr()] for x in xs]
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
    gs: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    backend: str,
    relu: bool = False,
) -> Tensor:
    return _empty(weights)


def _weight_gradients_in_float32(gs: Sequence[Tensor], xs: Sequence[Tensor], relu: bool) -> Tensor:
    from lgcnet_fast.native import conv3_weight_sums as native

    found = []
    for first in range(0, len(xs), native.MOST_CONVOLUTIONS):
        some = slice(first, first + native.MOST_CONVOLUTIONS)
        sums = native.conv3_weight_sums(_aligned(gs[some]), _aligned(xs[some]), relu=relu)
        found.append(sums.movedim(-1, 2))
    return found[0] if len(found) == 1 else torch.cat(found)


def _empty(weights: Sequence[Tensor]) -> Tensor:
    return empty_nhwc(weights[0], (len(weights), *weights[0].shape))


@custom_op(
    "lgcnet_fast::conv3_results",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, str backend, bool relu=False) -> Tensor[]",
)
def conv3_results(
    x: Tensor, weights: Sequence[Tensor], backend: str, relu: bool = False
) -> list[Tensor]:
    """3x3 convolutions of x or relu(x), stride 1, padding 1; x: NHWC; weights: of one shape."""
    from lgcnet_fast.kernels import conv3 as kernel
    from lgcnet_fast.kernels import conv3_walk
    from lgcnet_fast.native import conv3 as native

    if backend == "cuda":
        together = torch.stack([weight.permute(2, 3, 1, 0) for weight in weights])
        return native.conv3(*_aligned([x]), together, relu=relu)
    weights = [nhwc(weight) for weight in weights]
    if len(weights) == 1 and conv3_walk.walks(x):
        return [conv3_walk.conv3_walk(x, weights[0], relu)]
    out_channels, channels = weights[0].shape[:2]
    default = kernel.Conv3Config.default(x.shape, channels, out_channels, x.dtype, len(weights))
    config = tuned(default, "conv3_forward", _key(x, weights), x.device)
    return kernel.conv3_forward(x, weights, relu, config)


@conv3_results.register_fake
def _(x: Tensor, weights: Sequence[Tensor], backend: str, relu: bool = False) -> list[Tensor]:
    images, _, height, width = x.shape
    return [empty_nhwc(x, (images, len(weight), height, width)) for weight in weights]


@custom_op(
    "lgcnet_fast::conv3_input_gradient",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor x, Tensor[] weights, str backend, bool relu=False) -> Tensor",
)
def conv3_input_gradient(
    gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], backend: str, relu: bool = False
) -> Tensor:
    """Of x, from those of all `conv3_results`; gs: NHWC, like x."""
    from lgcnet_fast.kernels import conv3 as kernel
    from lgcnet_fast.kernels import conv3_walk
    from lgcnet_fast.native import conv3 as native

    if backend == "cuda":
        together = torch.stack([weight.permute(2, 3, 0, 1) for weight in weights])
        mask = _aligned([x])[0] if relu else None
        return native.conv3_map_gradient(_aligned(gs), together, mask=mask)
    weights = [nhwc(weight) for weight in weights]
    if len(weights) == 1 and conv3_walk.walks(gs[0]):
        return conv3_walk.conv3_walk_input_grad(gs[0], x, weights[0], relu)
    out_channels, channels = weights[0].shape[:2]
    default = kernel.Conv3Config.default(x.shape, out_channels, channels, x.dtype)
    config = tuned(default, "conv3_input_grad", _key(x, weights), x.device)
    return kernel.conv3_input_grad(gs, x, weights, relu, config)


@conv3_input_gradient.register_fake
def _(
    gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], backend: str, relu: bool = False
) -> Tensor:
    return empty_nhwc(x, x.shape)


def _aligned(maps: Sequence[Tensor]) -> list[Tensor]:
    """As the kernels of `cuda` read them, which is as torch allocates them."""
    return [x if x.data_ptr() % 16 == 0 else x.clone() for x in maps]


def _key(x: Tensor, weights: Sequence[Tensor]) -> str:
    return shape_key(x.dtype, x.shape, (len(weights), len(weights[0])))

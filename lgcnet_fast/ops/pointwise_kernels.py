"""The gradients of pointwise products: Triton's kernel with tuned tiles, or batched products.

In NHWC memory a map is a (positions, C) matrix, so a library's matrix products serve too: for the
backend `cuda`, and for maps that the kernel does not take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.lanes import side_by_side
from lgcnet_fast.ops.maps import accumulator, empty_nhwc, laid_like, unstacked
from lgcnet_fast.ops.tuning import shape_key, tuned


def pointwise_gradients(
    backend: str,
    gradients: Sequence[Tensor],
    maps: Tensor,
    weights: Tensor,
    out: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Of B products: those of the maps go to `out`, or take the place of the maps.

    gradients: stacks (b, N, C_out, H, W), NHWC, of B products in all; maps, out: (B, N, C, H, W),
    NHWC; weights: (B, C_out, C). What it returns adds up the gradients of the weights,
    (B, C_out, C) in the accumulator's dtype, and may run beside what reads the maps.
    """
    out = maps if out is None else out
    if backend == "triton":
        from lgcnet_fast.kernels import pointwise_backward as kernel

        if kernel.serves(maps, weights.shape[1]):
            shares = _by_kernel(unstacked(gradients), maps, weights, out)[1]
            return partial(kernel.summed, shares)
    return _by_library(gradients, maps, weights, out)


@custom_op(
    "lgcnet_fast::pointwise_convolution_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor weight) -> (Tensor, Tensor)",
)
def pointwise_convolution_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a 1x1 convolution of stride 1 under the backend `triton`: gradients of x and weight.

    g, x: NHWC; weight: (C_out, C, 1, 1). Its own gradient is as `laid_like` gives it, and comes of
    a job for later, see lanes.py.
    """
    from lgcnet_fast.kernels import pointwise_backward as kernel

    if kernel.serves(x, len(weight)):
        dx, shares = _by_kernel([g], x[None], weight.flatten(1)[None], empty_nhwc(x, x.shape)[None])
        (dw,) = side_by_side(
            x.device, [], [lambda: _like(weight, kernel.summed(shares, weight.dtype))]
        )
        return dx[0], dw
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    dx, dw = side_by_side(
        x.device,
        [partial(convolution_gradient, 0, g, x, weight, geometry)],
        [lambda: _like(weight, convolution_gradient(1, g, x, weight, geometry))],
    )
    return dx, dw


@pointwise_convolution_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return empty_nhwc(x, x.shape), torch.empty_like(weight)


def _like(weight: Tensor, gradient: Tensor) -> Tensor:
    return laid_like([weight], [gradient.view(weight.shape)])[0]


def convolution_gradient(
    which: int, g: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]
) -> Tensor:
    """By torch, of x (0) or of the weight (1); geometry: what it takes after the bias."""
    wanted = [which == 0, which == 1, False]
    found: Tensor = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, wanted)[
        which
    ]
    return found


def _by_kernel(
    gradients: Sequence[Tensor], maps: Tensor, weights: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """`pointwise_backward` with the tile that the tuning table of the device has."""
    from lgcnet_fast.kernels.pointwise_backward import ProductGradientsConfig, pointwise_backward

    branches, out_channels, channels = weights.shape
    positions = maps[0].numel() // channels
    default = ProductGradientsConfig.default(
        branches, positions, channels, out_channels, maps.dtype
    )
    key = shape_key(maps.dtype, maps.shape[1:], (branches, out_channels))
    config = tuned(default, "pointwise_backward", key, maps.device)
    return pointwise_backward(gradients, maps, weights, out, config)


def _by_library(
    gradients: Sequence[Tensor], maps: Tensor, weights: Tensor, out: Tensor
) -> Callable[[], Tensor]:
    stacks = [len(g) for g in gradients]
    products = weights.new_empty(len(weights), _parts(maps), *weights.shape[1:])
    shares = (part.split(stacks) for part in (maps, weights, out, products))
    jobs = [partial(_products, *one) for one in zip(gradients, *shares, strict=True)]
    side_by_side(maps.device, jobs)
    return partial(products.sum, 1, dtype=accumulator(maps.dtype))


def _products(g: Tensor, maps: Tensor, weights: Tensor, out: Tensor, products: Tensor) -> None:
    """Of a stack of b products: those of the weights, in parts, and of the maps.

    g: (b, N, C_out, H, W). The positions far outnumber the entries of a weight's gradient, so they
    are cut into parts, whose `products` (b, parts, C_out, C) run side by side and are yet to be
    added. `out`, where the gradients of the maps go, may be the maps, once these have served.
    """
    _weight_products(g, maps, products)
    torch.bmm(matrices(g), weights, out=matrices(out))


def _weight_products(g: Tensor, maps: Tensor, products: Tensor) -> None:
    gs, xs = matrices(g), matrices(maps)
    parts, length = cut(maps.shape[-4], gs.shape[1])
    whole = parts * length
    if whole == gs.shape[1]:
        torch.bmm(
            gs.unflatten(1, (parts, length)).flatten(0, 1).transpose(1, 2),
            xs.unflatten(1, (parts, length)).flatten(0, 1),
            out=products.flatten(0, 1),
        )
        return
    for one, x, found in zip(gs, xs, products, strict=True):
        ones, several = (matrix[:whole].unflatten(0, (parts, length)) for matrix in (one, x))
        torch.bmm(ones.transpose(1, 2), several, out=found[:parts])
        torch.mm(one[whole:].t(), x[whole:], out=found[parts])


def product_by_library(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution of an NHWC map (N, C, H, W) with (C_out, C), NHWC.

    A library's products of 32-bit matrices are faster than its convolutions in NHWC.
    """
    y = empty_nhwc(x, (len(x), len(weight), *x.shape[2:]))
    torch.mm(matrices(x)[0], weight.t(), out=matrices(y)[0])
    return y


def map_gradient_by_library(g: Tensor, weight: Tensor) -> Tensor:
    """Of `product_by_library`, NHWC; g: the gradient of its result, NHWC."""
    dx = empty_nhwc(g, (len(g), weight.shape[1], *g.shape[2:]))
    torch.mm(matrices(g)[0], weight, out=matrices(dx)[0])
    return dx


def weight_gradient_by_library(g: Tensor, x: Tensor) -> Tensor:
    """Of `product_by_library`, (C_out, C), in the accumulator's dtype."""
    products = g.new_empty(1, _parts(x), g.shape[1], x.shape[1])
    _weight_products(g, x, products)
    return products[0].sum(0, dtype=accumulator(x.dtype))


def matrices(stack: Tensor) -> Tensor:
    """NHWC maps (..., N, C, H, W), the outer dimensions as one: (B, N H W, C), a view."""
    images, channels, height, width = stack.shape[-4:]
    return stack.movedim(-3, -1).reshape(-1, images * height * width, channels)


def _parts(maps: Tensor) -> int:
    """Products of a branch that `_weight_products` leaves to be added."""
    images, _, height, width = maps.shape[-4:]
    parts, length = cut(images, images * height * width)
    return parts + (parts * length < images * height * width)


@cache
def cut(images: int, positions: int) -> tuple[int, int]:
    """Parts into which the positions of all images are cut, and how many each has.

    One an image, or as many as leave each at least POSITIONS_A_PART. They hold all positions if
    that takes no more than halving their number; else a few are left over, as of 193 x 193, which
    only 193 divides.
    """
    most = max(images, positions // POSITIONS_A_PART)
    equal = next(parts for parts in range(most, 0, -1) if positions % parts == 0)
    parts = equal if 2 * equal > most else most
    return parts, positions // parts


POSITIONS_A_PART = 1024
"""Long enough for a matrix product to run at speed."""

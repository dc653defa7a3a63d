"""`mixed_norm_sum` with `Products` among its entries, by Triton's kernels.

Mean and covariance of the depthwise maps give the statistics of their products, the weights of the
sum and, in the backward pass, what takes the gradient to them: see docs/mixed_node.md for the
algebra. Raw maps beside them are added by the same launch, and differentiated as in
`fused_mixed_norm_sum`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.library import custom_op

from lgcnet_fast.ops import fused_mixed_norm_sum
from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.fused_mixed_norm_sum import (
    mixed_sum_backward_beside,
    norm_statistics,
    picked_weights,
    running_statistics,
)
from lgcnet_fast.ops.fused_separable_branches import stacked_matrices, weight_gradients
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import accumulator, empty_nhwc, nhwc, unstacked
from lgcnet_fast.ops.products import Entry, Products, grouped, likenesses, multiplied
from lgcnet_fast.ops.running_statistics import update_running_statistics
from lgcnet_fast.ops.tuning import shape_key, tuned

T = TypeVar("T")


class Branches(NamedTuple):
    """What a node knows of K products when it sums them."""

    matrices: Tensor
    """(K, C_out, C): P, in the dtype of the maps."""
    mean: Tensor
    """(K, C), of the maps; empty with running statistics."""
    covariance: Tensor
    """(K, C, C), of the maps; empty with running statistics."""
    statistics: Tensor
    """(3, K, C_out): mean, variance and inverse deviation of the products."""
    weights: Tensor
    """(K, C_out, C): W, in the dtype of the maps."""
    shift: Tensor
    """(K, C_out): what centres each of them."""


class Settings(NamedTuple):
    """Of a node."""

    training: bool
    """Whether the statistics are the batch's."""
    counts: tuple[int, int, int, int]
    """Of stacks of depthwise maps, pointwise weights, raw entries and plain ones."""


def refuse(
    backend: str,
    ys: Sequence[Entry],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int],
) -> str | None:
    """Why the kernels of `backend` cannot serve these arguments of `mixed_norm_sum`."""
    return fused_mixed_norm_sum.refuse(backend, likenesses(ys), z, norms, options)


def run(
    backend: str,
    ys: Sequence[Entry],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int],
) -> Tensor:
    """`mixed_norm_sum`, see there. The first call must come before capturing a CUDA graph."""
    products, raw, plain = grouped(ys, norms, options)
    if backend != "triton" or not products.entries:
        return fused_mixed_norm_sum.run(backend, multiplied(ys), z, norms, options)
    weights = picked_weights(z, (*products.options, *raw.options, *plain.options))
    ds = [nhwc(entry.maps) for entry in products.entries]
    pointwise = [weight for entry in products.entries for weight in entry.weights]
    ys, xs = ([nhwc(y) for y in group.entries] for group in (raw, plain))
    with torch.no_grad():
        jobs: list[Callable[[], Any]] = [
            partial(_branches, ds, pointwise, products.norms, weights),
            partial(_raw_statistics, ys, raw.norms, len(xs), products.entries[0]),
        ]
        branches, statistics = side_by_side(z.device, jobs)
    counts = (len(ds), len(pointwise), len(ys), len(xs))
    settings = Settings(products.norms[0].training, counts)
    tensors = (*ds, *pointwise, *ys, *xs)
    result: Tensor = _ProductSum.apply(settings, branches, statistics, weights, *tensors)
    return result


def _branches(
    ds: Sequence[Tensor], pointwise: Sequence[Tensor], norms: Sequence[Any], z: Tensor
) -> Branches:
    """Updates the running statistics in training. z: the weights of the products come first."""
    matrices = stacked_matrices(pointwise, ds[0])
    z, eps = z[: len(matrices)], norms[0].eps
    if not norms[0].training:
        statistics = running_statistics(norms, eps)
        scales = z[:, None] * statistics[2]
        weights = (scales[:, :, None] * matrices).to(matrices.dtype)
        nothing = statistics.new_empty(0)
        return Branches(matrices, nothing, nothing, statistics, weights, scales * statistics[0])
    mean, covariance = product_statistics(ds)
    statistics, weights, shift = product_weights(mean, covariance, matrices, z, eps)
    update_running_statistics(norms, statistics[0], statistics[1], positions_of(ds[0]))
    return Branches(matrices, mean, covariance, statistics, weights, shift)


def _raw_statistics(
    ys: Sequence[Tensor], norms: Sequence[Any], plain: int, beside: Products
) -> Tensor:
    """(3, R, C_out) of the R raw maps."""
    if not ys:
        like = beside.like()
        return like.new_empty(3, 0, like.shape[2], dtype=accumulator(like.dtype))
    statistics, _ = norm_statistics("triton", ys, norms, plain)
    return statistics


def positions_of(stack: Tensor) -> int:
    """Of each of its maps."""
    images, _, height, width = stack.shape[-4:]
    return images * height * width


class _ProductSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        branches: Branches,
        statistics: Tensor,
        z: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        """statistics: of the raw maps; z: weights of products, raw and plain maps."""
        ds, weights, ys, xs = _parted(tensors, settings.counts)
        ctx.save_for_backward(*ds, *ys, *xs, z, statistics, *branches[:4])
        ctx.settings, ctx.owners = settings, gradient_owners(weights)
        ctx.like = (weights[0].dtype, weights[0].shape)
        others = z[len(weights) :]
        return product_sum(ds, branches.weights, branches.shift, ys, statistics, xs, others)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        stacks, products, raw, plain = ctx.settings.counts
        *maps, z, statistics, matrices, mean, covariance, of_products = ctx.saved_tensors
        ds, _, ys, xs = _parted(maps, (stacks, 0, raw, plain))
        g, training = nhwc(g), ctx.settings.training
        branches = (matrices, mean, covariance, of_products)
        dz = torch.empty_like(z, dtype=accumulator(g.dtype))
        dz_products, dz_others = dz[:products], dz[products:]
        jobs = [
            partial(product_gradients, g, ds, *branches, z[:products], training, dz_products),
            partial(_other_gradients, g, ys, xs, z[products:], statistics, training, dz_others),
        ]
        (*dds, d_products), d_others = side_by_side(g.device, jobs)
        settle(g.device, ctx.owners)
        weights = weight_gradients(d_products, *ctx.like)
        return None, None, None, dz.to(z.dtype), *dds, *weights, *d_others


def _tuned(default: T, launch: str, d: Tensor, *counts: Sequence[int]) -> T:
    """The tile that the tuning table of the device has for a launch over maps like d."""
    return tuned(default, launch, shape_key(d.dtype, d.shape, *counts), d.device)


def _parted(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Neighbours, so many of each kind."""
    rest = iter(tensors)
    return [[next(rest) for _ in range(count)] for count in counts]


def _other_gradients(
    g: Tensor,
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    z: Tensor,
    statistics: Tensor,
    training: bool,
    dz: Tensor,
) -> list[Tensor]:
    """Of raw maps and plain ones; those of their weights go to dz."""
    if ys:
        return mixed_sum_backward_beside(g, ys, xs, z, statistics, training, "triton", dz)
    for place, x in zip(dz, xs, strict=True):
        torch.sum(g * x, dim=(0, 1, 2, 3), dtype=dz.dtype, out=place)
    return [(weight * g).to(g.dtype) for weight in z]


@custom_op("lgcnet_fast::product_statistics", mutates_args=())
def product_statistics(ds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (K, C) and biased covariance (K, C, C) of the maps of all stacks."""
    from lgcnet_fast.kernels.covariance import CovarianceConfig, covariance
    from lgcnet_fast.kernels.tile_statistics import check_positions

    check_positions("ys", ds[0], positions_of(ds[0]))
    maps = unstacked(ds)
    default = CovarianceConfig.default(maps[0].shape[1], maps[0].dtype)
    return covariance(maps, _tuned(default, "product_statistics", maps[0], (len(maps),)))


@product_statistics.register_fake
def _(ds: list[Tensor]) -> tuple[Tensor, Tensor]:
    count, channels = sum(map(len, ds)), ds[0].shape[-3]
    mean = ds[0].new_empty(count, channels, dtype=accumulator(ds[0].dtype))
    return mean, mean.new_empty(count, channels, channels)


@custom_op("lgcnet_fast::product_weights", mutates_args=())
def product_weights(
    mean: Tensor, covariance: Tensor, matrices: Tensor, z: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics (3, K, C_out), weights and shift, see `Branches`."""
    from lgcnet_fast.kernels import product_algebra

    found = product_algebra.product_weights(mean, covariance, matrices, z, eps)
    return found.statistics, found.weights, found.shift


@product_weights.register_fake
def _(
    mean: Tensor, covariance: Tensor, matrices: Tensor, z: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = mean.new_empty(3, *matrices.shape[:2])
    return statistics, torch.empty_like(matrices), mean.new_empty(matrices.shape[:2])


@custom_op("lgcnet_fast::product_sum", mutates_args=())
def product_sum(
    ds: list[Tensor],
    matrices: Tensor,
    shifts: Tensor,
    ys: list[Tensor],
    statistics: Tensor,
    xs: list[Tensor],
    weights: Tensor,
) -> Tensor:
    """Products less shifts (K, C_out), normalised and plain maps, which have weights (R + J,)."""
    from lgcnet_fast.kernels import product_sum as kernel
    from lgcnet_fast.kernels.common import has_large_cores

    maps, raw = unstacked(ds), unstacked(ys)
    products, out_channels, channels = matrices.shape
    large = has_large_cores(maps[0])
    default = kernel.ProductSumConfig.default(channels, out_channels, maps[0].dtype, large)
    counts = ((products, out_channels), (len(raw), len(xs)))
    config = _tuned(default, "product_sum", maps[0], *counts)
    return kernel.product_sum(maps, matrices, shifts, raw, statistics, xs, weights, config)


@product_sum.register_fake
def _(
    ds: list[Tensor],
    matrices: Tensor,
    shifts: Tensor,
    ys: list[Tensor],
    statistics: Tensor,
    xs: list[Tensor],
    weights: Tensor,
) -> Tensor:
    images, _, height, width = ds[0].shape[-4:]
    return empty_nhwc(ds[0], (images, matrices.shape[1], height, width))


@custom_op("lgcnet_fast::product_gradients", mutates_args=("dz",))
def product_gradients(
    g: Tensor,
    ds: list[Tensor],
    matrices: Tensor,
    mean: Tensor,
    covariance: Tensor,
    statistics: Tensor,
    z: Tensor,
    training: bool,
    dz: Tensor,
) -> list[Tensor]:
    """Gradients of every stack of maps and of the matrices, (K, C_out, C); dz: for those of z.

    These and dz are in the accumulator's dtype.
    """
    from lgcnet_fast.kernels import product_algebra
    from lgcnet_fast.kernels import product_gradients as kernel
    from lgcnet_fast.kernels.common import has_large_cores

    maps, (products, out_channels, channels) = unstacked(ds), matrices.shape
    sizes = (products, positions_of(g), channels, out_channels, g.dtype, has_large_cores(g))
    counts = (products, out_channels)
    tile = kernel.ProductSumsConfig.default(*sizes)
    sums, total = kernel.product_sums(g, maps, _tuned(tile, "product_sums", maps[0], counts))
    found = product_algebra.product_coefficients(
        sums, total, mean, covariance, matrices, statistics, z, positions_of(g), training, dz
    )
    dds = [empty_nhwc(d, d.shape) for d in ds]
    through = (found.from_gradient, found.from_map, found.shift)
    default = kernel.InputGradientsConfig.default(*sizes)
    config = _tuned(default, "product_input_gradients", maps[0], counts)
    kernel.product_input_gradients(g, maps, *through, outs=unstacked(dds), config=config)
    return [*dds, found.matrix_gradients]


@product_gradients.register_fake
def _(
    g: Tensor,
    ds: list[Tensor],
    matrices: Tensor,
    mean: Tensor,
    covariance: Tensor,
    statistics: Tensor,
    z: Tensor,
    training: bool,
    dz: Tensor,
) -> list[Tensor]:
    sums = matrices.new_empty(matrices.shape, dtype=accumulator(g.dtype))
    return [*(empty_nhwc(d, d.shape) for d in ds), sums]


FORMS = {
    backend: Implementation(partial(run, backend), partial(refuse, backend))
    for backend in ("triton", "cuda")
}

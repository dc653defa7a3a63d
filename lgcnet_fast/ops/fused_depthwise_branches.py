"""Branches of which the backend `triton` hands on some as depthwise maps, for `mixed_norm_sum`.

One launch makes the depthwise maps that are handed on, another those that are multiplied here,
first stages of pairs. The nodes keep theirs for the backward pass; of those of first stages large
ones are kept too. Gradients are read where the nodes have put them.

Traffic in maps of the output's size, with B branches, F of them multiplied here, C_out = C and
stride 1: forward reads 2 + F and writes B + F, backward reads 2 B + 2 F + 2 and writes F + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops import fused_separable_branches
from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.depthwise_kernels import (
    depthwise_gradients,
    depthwise_weight_gradients,
    gradients_take_one_launch,
)
from lgcnet_fast.ops.fan_out import added_to, handed_out
from lgcnet_fast.ops.fused_separable_branches import (
    by_edge,
    deferred_input_gradient,
    depthwise_maps,
    kept_maps,
    maps_to_overwrite,
    stacked_matrices,
    stacked_windows,
    weight_gradients,
)
from lgcnet_fast.ops.lanes import settle
from lgcnet_fast.ops.maps import accumulator, computed_dtype, empty_nhwc, nhwc, unstacked
from lgcnet_fast.ops.pointwise_kernels import matrices, pointwise_gradients
from lgcnet_fast.ops.products import Entry, Products, pay


class Settings(NamedTuple):
    """Of the branches of a map."""

    dilations: list[int]
    stride: int
    multiplied: list[int]
    """The branches of an edge whose products are made here."""


def refuse(
    backend: str,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
    to_sum: Sequence[bool],
) -> str | None:
    """Why the kernels of `backend` cannot serve these arguments of `separable_branches`."""
    branches = (x, depthwise, pointwise, dilations, stride, stacks)
    return fused_separable_branches.refuse(backend, *branches)


def run(
    backend: str,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
    to_sum: Sequence[bool],
) -> list[list[Entry]]:
    """`separable_branches`, see there: a stack of maps, or products, in each list."""
    if backend != "triton" or not any(to_sum) or not pay(x, len(pointwise[0]), stride):
        branches = (x, depthwise, pointwise, dilations, stride, stacks)
        return [list[Entry](maps) for maps in fused_separable_branches.run(backend, *branches)]
    x = nhwc(x.to(computed_dtype(x)))
    here = [branch for branch, later in enumerate(to_sum) if not later]
    settings = Settings(list(dilations), stride, here)
    own = _of_branches(pointwise, here, len(dilations))
    defers = len(depthwise) > 1 and handed_out(x)
    maps = _DepthwiseBranches.apply(settings, stacks, defers, len(depthwise), x, *depthwise, *own)
    entries: list[list[Entry]] = []
    first = 0
    for stack, count in zip(maps, stacks, strict=True):
        later = to_sum[first % len(dilations)]
        entries.append([Products(stack, pointwise[first : first + count]) if later else stack])
        first += count
    return entries


class _DepthwiseBranches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        stacks: Sequence[int],
        defers: bool,
        branches: int,
        x: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """weights: depthwise of all branches, pointwise of those multiplied here.

        defers: whether the gradient of x may be a `DeferredGradient`.
        """
        depthwise, pointwise = weights[:branches], weights[branches:]
        dilations, stride, here = settings
        later = [branch for branch in range(len(dilations)) if branch not in here]
        filtered = _filtered(x, depthwise, dilations, stride, later)
        windows = products = x.new_empty(0)
        raw = filtered[:, :0]
        if here:
            windows = stacked_windows(_of_branches(depthwise, here, len(dilations)))
            products = stacked_matrices(pointwise, x)
            own = [dilations[branch] for branch in here]
            maps = depthwise_maps(x, windows, own, stride, "triton")
            raw = multiplied_maps(maps, products)
            ctx.filtered = kept_maps(maps, "triton")
        ctx.save_for_backward(x, stacked_windows(depthwise), windows, products)
        ctx.settings, ctx.owners = settings, gradient_owners(weights)
        ctx.defers = defers
        groups = [group for group in (depthwise, pointwise) if group]
        ctx.like = [(group[0].dtype, group[0].shape) for group in groups]
        return tuple(_stacks(filtered, raw, here, stacks))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, windows, own_windows, products = ctx.saved_tensors
        dilations, stride, here = ctx.settings
        own = x.new_empty(0)
        if here:
            again = [dilations[branch] for branch in here]
            own = maps_to_overwrite(ctx.filtered, x, own_windows, again, stride, "triton")
        stacks = list(map(nhwc, gradients))
        arguments = stacks, own, x, windows, products, *ctx.settings
        maps = _with_own(stacks, own, dilations, here)
        at_once = gradients_take_one_launch(maps, x, dilations, stride)
        defers = ctx.defers and not torch.is_grad_enabled()
        if defers and not at_once:
            found = depthwise_branches_weight_gradients(*arguments)
            dx = deferred_input_gradient(maps, x, windows, dilations, stride)
        else:
            dx, *found = depthwise_branches_backward(*arguments)
            dx = added_to(dx, x) if defers else dx
        settle(dx.device, ctx.owners)
        weights = [
            gradient
            for of_kind, like in zip(found, ctx.like, strict=False)
            for gradient in weight_gradients(of_kind, *like)
        ]
        return None, None, None, None, dx, *weights


def _of_branches(
    weights: Sequence[Tensor], branches: Sequence[int], of_an_edge: int
) -> list[Tensor]:
    """Edge after edge."""
    return [weight for at, weight in enumerate(weights) if at % of_an_edge in branches]


def _filtered(
    x: Tensor,
    depthwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    branches: Sequence[int],
) -> Tensor:
    """(edges, branches, N, C, H', W')."""
    windows = stacked_windows(_of_branches(depthwise, branches, len(dilations)))
    own = [dilations[branch] for branch in branches]
    return depthwise_maps(x, windows, own, stride, "triton")


def multiplied_maps(maps: Tensor, products: Tensor) -> Tensor:
    """maps: (edges, B, N, C, H', W'), products: (edges * B, C_out, C) -> like maps, C_out wide."""
    edges, here, images, _, height, width = maps.shape
    out = empty_nhwc(maps, (edges, here, images, products.shape[1], height, width))
    torch.bmm(matrices(maps), products.transpose(1, 2), out=matrices(out))
    return out


def _stacks(
    filtered: Tensor, raw: Tensor, here: Sequence[int], stacks: Sequence[int]
) -> Iterator[Tensor]:
    """Views, in order."""
    branches, first = filtered.shape[1] + len(here), 0
    for count in stacks:
        edge, branch = divmod(first, branches)
        before = sum(other < branch for other in here)
        if branch in here:
            yield raw[edge, before : before + count]
        else:
            yield filtered[edge, branch - before : branch - before + count]
        first += count


@custom_op("lgcnet_fast::depthwise_branches_backward", mutates_args=("own",))
def depthwise_branches_backward(
    gradients: list[Tensor],
    own: Tensor,
    x: Tensor,
    windows: Tensor,
    products: Tensor,
    dilations: list[int],
    stride: int,
    multiplied: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the windows as (edges * B, C, 3, 3), and of the products.

    gradients: stacks of them, of the raw maps of branches that are multiplied here and of the
    depthwise maps of the others; own, products: the depthwise maps of the former, whose place
    their gradients take, and what multiplies them, empty where there are none. Gradients of weights
    are in the accumulator's dtype.
    """
    of_products = _own_gradients(gradients, own, products, dilations, multiplied)
    maps = _with_own(gradients, own, dilations, multiplied)
    launch = (x, by_edge(windows, dilations), dilations, stride)
    return depthwise_gradients("triton", maps, *launch, of_products)


def _own_gradients(
    gradients: list[Tensor],
    own: Tensor,
    products: Tensor,
    dilations: Sequence[int],
    multiplied: Sequence[int],
) -> Callable[[], Tensor]:
    """Of the depthwise maps of branches that are multiplied here, in their place; gives what sums
    those of the products."""
    if not multiplied:
        return lambda: products.new_empty(0, dtype=accumulator(products.dtype))
    raw = [
        g[None] for at, g in enumerate(unstacked(gradients)) if at % len(dilations) in multiplied
    ]
    return pointwise_gradients("triton", raw, own.flatten(0, 1), products)


def _with_own(
    gradients: list[Tensor], own: Tensor, dilations: Sequence[int], multiplied: Sequence[int]
) -> list[Tensor]:
    """Of all depthwise maps: those of branches that are multiplied here from `own`."""
    rest = iter(own.flatten(0, 1) if multiplied else ())
    return [
        next(rest) if at % len(dilations) in multiplied else g
        for at, g in enumerate(unstacked(gradients))
    ]


@depthwise_branches_backward.register_fake
def _(
    gradients: list[Tensor],
    own: Tensor,
    x: Tensor,
    windows: Tensor,
    products: Tensor,
    dilations: list[int],
    stride: int,
    multiplied: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(x, windows, products)


@custom_op("lgcnet_fast::depthwise_branches_weight_gradients", mutates_args=("own",))
def depthwise_branches_weight_gradients(
    gradients: list[Tensor],
    own: Tensor,
    x: Tensor,
    windows: Tensor,
    products: Tensor,
    dilations: list[int],
    stride: int,
    multiplied: list[int],
) -> tuple[Tensor, Tensor]:
    """As `depthwise_branches_backward` of several branches, but for the gradient of x."""
    of_products = _own_gradients(gradients, own, products, dilations, multiplied)
    maps = _with_own(gradients, own, dilations, multiplied)
    launch = (x, by_edge(windows, dilations), dilations, stride)
    return depthwise_weight_gradients(maps, *launch, of_products)


@depthwise_branches_weight_gradients.register_fake
def _(
    gradients: list[Tensor],
    own: Tensor,
    x: Tensor,
    windows: Tensor,
    products: Tensor,
    dilations: list[int],
    stride: int,
    multiplied: list[int],
) -> tuple[Tensor, Tensor]:
    _, d_windows, d_products = _gradients_like(x, windows, products)
    return d_windows, d_products


def _gradients_like(x: Tensor, windows: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, of the windows and of the products, without values."""
    dtype = accumulator(x.dtype)
    return (
        empty_nhwc(x, x.shape),
        x.new_empty(len(windows), x.shape[1], 3, 3, dtype=dtype),
        x.new_empty(products.shape, dtype=dtype),
    )


FORMS = {
    backend: Implementation(partial(run, backend), partial(refuse, backend))
    for backend in ("triton", "cuda")
}

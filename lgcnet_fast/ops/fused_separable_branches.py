"""`separable_branches` by kernels, registered with torch: `lgcnet_fast::separable_branches`.

It takes the backend of the depthwise kernels (see depthwise_kernels.py). The pointwise products are
one batched matrix product an edge: in NHWC memory a depthwise map is a (positions, C) matrix. The
backward pass multiplies for the pointwise gradients and for those of the depthwise maps (see
pointwise_kernels.py), and ends in the gradients of x and of the depthwise weights. Under Triton
large depthwise maps in 16-bit storage are kept for it; others it computes again.

Traffic in maps of the output's size, with B branches, C_out = C and stride 1: forward reads
B + 1 and writes 2 B, backward reads 4 B + 2 and writes B + 1 where one kernel takes both
gradients of the products; B + 1 more each way where depthwise maps are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.deferred_gradient import DeferredGradient
from lgcnet_fast.ops.depthwise_kernels import (
    depthwise_gradients,
    depthwise_input_gradient,
    depthwise_weight_gradients,
    filtered_maps,
    gradients_take_one_launch,
)
from lgcnet_fast.ops.fan_out import added_to, handed_out
from lgcnet_fast.ops.lanes import keep_until_joined, settle, side_by_side
from lgcnet_fast.ops.maps import accumulator, computed_dtype, empty_nhwc, nhwc, refusal_by
from lgcnet_fast.ops.packed_weights import packed
from lgcnet_fast.ops.pointwise_kernels import matrices, pointwise_gradients
from lgcnet_fast.ops.products import SMALLEST

FEWEST = 64
"""Channels of depthwise maps that are kept for the backward pass."""


class Settings(NamedTuple):
    """Of the branches of a map."""

    dilations: list[int]
    stride: int
    backend: str


def refuse(
    backend: str,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
) -> str | None:
    """Why the kernels of `backend` cannot serve these arguments of `separable_branches`."""
    return refusal_by(backend, "x", x)


def run(
    backend: str,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
) -> list[list[Tensor]]:
    """`separable_branches`, see there: one stack of maps in each list."""
    x = nhwc(x.to(computed_dtype(x)))
    settings = Settings(list(dilations), stride, backend)
    defers = backend == "triton" and len(depthwise) > 1 and handed_out(x)
    maps = _SeparableBranches.apply(settings, stacks, defers, x, *depthwise, *pointwise)
    return [[stack] for stack in maps]


class _SeparableBranches(torch.autograd.Function):
    """The stacks of an edge are parts of one product."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        stacks: Sequence[int],
        defers: bool,
        x: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """defers: whether the gradient of x may be a `DeferredGradient`."""
        half = len(weights) // 2
        windows, matrices = stacked_windows(weights[:half]), stacked_matrices(weights[half:], x)
        filtered, edges = separable_maps(x, windows, matrices, *settings)
        ctx.save_for_backward(x, windows, matrices)
        ctx.filtered = kept_maps(filtered, settings.backend)
        ctx.settings, ctx.owners = settings, gradient_owners(weights)
        ctx.defers = defers
        ctx.like = [(weight.dtype, weight.shape) for weight in (weights[0], weights[half])]
        return tuple(_stacks(edges, stacks))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, windows, matrices = ctx.saved_tensors
        filtered = maps_to_overwrite(ctx.filtered, x, windows, *ctx.settings)
        arguments = list(map(nhwc, gradients)), filtered, x, windows, matrices, *ctx.settings
        at_once = ctx.settings.backend == "triton" and gradients_take_one_launch(
            filtered, x, *ctx.settings[:2]
        )
        defers = ctx.defers and not torch.is_grad_enabled()
        if defers and not at_once:
            found = separable_branches_weight_gradients(*arguments)
            maps = [filtered.flatten(0, 1)]
            dx = deferred_input_gradient(maps, x, windows, *ctx.settings[:2])
        else:
            dx, *found = separable_branches_backward(*arguments)
            dx = added_to(dx, x) if defers else dx
        settle(dx.device, ctx.owners)
        weights = [
            gradient
            for of_kind, like in zip(found, ctx.like, strict=True)
            for gradient in weight_gradients(of_kind, *like)
        ]
        return None, None, None, dx, *weights


def stacked_windows(depthwise: Sequence[Tensor]) -> Tensor:
    """Weights (C, 1, 3, 3) as the kernels take them: (B, 3, 3, C), in their dtype."""
    ready = packed(depthwise, depthwise[0].dtype)
    if ready is not None:
        return ready
    windows = torch.stack([weight.flatten(1).t() for weight in depthwise])
    return windows.unflatten(1, (3, 3))


def stacked_matrices(pointwise: Sequence[Tensor], x: Tensor) -> Tensor:
    """Weights (C_out, C, 1, 1) in the dtype of x: (B, C_out, C)."""
    ready = packed(pointwise, x.dtype)
    if ready is not None:
        return ready
    matrices = x.new_empty(len(pointwise), *pointwise[0].shape[:2])
    torch._foreach_copy_(list(matrices.unbind()), [weight.flatten(1) for weight in pointwise])
    return matrices


def weight_gradients(found: Tensor, dtype: torch.dtype, shape: torch.Size) -> Sequence[Tensor]:
    """Those of stacked weights, each as its parameter (dtype, shape) wants it."""
    if found.dtype != dtype:
        settle(found.device)
    return found.to(dtype).view(-1, *shape).unbind()


def _stacks(edges: Sequence[Tensor], stacks: Sequence[int]) -> Iterator[Tensor]:
    """The maps of edge after edge (B, N, C_out, H', W') as stacks of neighbours, views."""
    counts = iter(stacks)
    for edge in edges:
        first = 0
        while first < len(edge):
            count = next(counts)
            yield edge[first : first + count]
            first += count


def by_edge(windows: Tensor, dilations: Sequence[int]) -> Tensor:
    return windows.unflatten(0, (-1, len(dilations)))


def _output_shape(x: Tensor, pointwise: Tensor, stride: int) -> tuple[int, int, int, int]:
    images, _, height, width = x.shape
    return images, pointwise.shape[1], -(-height // stride), -(-width // stride)


@custom_op("lgcnet_fast::depthwise_maps", mutates_args=())
def depthwise_maps(
    x: Tensor, windows: Tensor, dilations: list[int], stride: int, backend: str
) -> Tensor:
    """(edges, B, N, C, H', W') of B dilations; windows: (edges * B, 3, 3, C)."""
    return filtered_maps(backend, x, by_edge(windows, dilations), dilations, stride)


@depthwise_maps.register_fake
def _(x: Tensor, windows: Tensor, dilations: list[int], stride: int, backend: str) -> Tensor:
    images, channels, height, width = x.shape
    size = (-(-height // stride), -(-width // stride))
    edges = len(windows) // len(dilations)
    return empty_nhwc(x, (edges, len(dilations), images, channels, *size))


def separable_maps(
    x: Tensor,
    windows: Tensor,
    pointwise: Tensor,
    dilations: list[int],
    stride: int,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """The depthwise maps, and what the products make of those of each edge.

    windows: (edges * B, 3, 3, C), pointwise: (edges * B, C_out, C) like x.
    """
    filtered = depthwise_maps(x, windows, dilations, stride, backend)
    shape = (len(dilations), *_output_shape(x, pointwise, stride))
    edges = [empty_nhwc(x, shape) for _ in filtered]
    products = zip(filtered, pointwise.split(len(dilations)), edges, strict=True)
    jobs = [
        partial(torch.bmm, matrices(maps), weights.transpose(1, 2), out=matrices(out))
        for maps, weights, out in products
    ]
    side_by_side(x.device, jobs)
    return filtered, edges


def kept_maps(filtered: Tensor, backend: str) -> list[Tensor]:
    """What `maps_to_overwrite` takes in the backward pass: large maps, or nothing.

    Keeping all would take more memory than stock leaves room for; these take longest to make again
    for what they take.
    """
    _, _, images, channels, height, width = filtered.shape
    large = channels >= FEWEST and images * channels * height * width >= SMALLEST
    return [filtered] if backend == "triton" and filtered.element_size() == 2 and large else []


def maps_to_overwrite(
    kept: list[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: list[int],
    stride: int,
    backend: str,
) -> Tensor:
    """The depthwise maps, over which gradients may be written: a second pass makes them again."""
    if not kept:
        return depthwise_maps(x, windows, dilations, stride, backend)
    filtered = kept.pop()
    keep_until_joined(filtered)
    return filtered


@custom_op(
    "lgcnet_fast::separable_branches_backward",
    mutates_args=("filtered",),
    schema="(Tensor[] gradients, Tensor(a!) filtered, Tensor x, Tensor depthwise, "
    "Tensor pointwise, int[] dilations, int stride, str backend) -> (Tensor, Tensor, Tensor)",
)
def separable_branches_backward(
    gradients: list[Tensor],
    filtered: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, depthwise (as (B, C, 3, 3)) and pointwise from those of stacks of maps.

    filtered: the depthwise maps, whose place their gradients take. Those of the weights are in the
    accumulator's dtype.
    """
    windows = by_edge(depthwise, dilations)
    added_up = pointwise_gradients(backend, gradients, filtered.flatten(0, 1), pointwise)
    return depthwise_gradients(backend, filtered, x, windows, dilations, stride, added_up)


@separable_branches_backward.register_fake
def _(
    gradients: list[Tensor],
    filtered: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    branches, c_out, channels = pointwise.shape
    dtype = accumulator(x.dtype)
    return (
        empty_nhwc(x, x.shape),
        x.new_empty(branches, channels, 3, 3, dtype=dtype),
        x.new_empty(branches, c_out, channels, dtype=dtype),
    )


@custom_op(
    "lgcnet_fast::separable_branches_weight_gradients",
    mutates_args=("filtered",),
    schema="(Tensor[] gradients, Tensor(a!) filtered, Tensor x, Tensor depthwise, "
    "Tensor pointwise, int[] dilations, int stride, str backend) -> (Tensor, Tensor)",
)
def separable_branches_weight_gradients(
    gradients: list[Tensor],
    filtered: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `separable_branches_backward` of several branches, but for the gradient of x."""
    windows = by_edge(depthwise, dilations)
    added_up = pointwise_gradients(backend, gradients, filtered.flatten(0, 1), pointwise)
    return depthwise_weight_gradients(filtered, x, windows, dilations, stride, added_up)


@separable_branches_weight_gradients.register_fake
def _(
    gradients: list[Tensor],
    filtered: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    branches, c_out, channels = pointwise.shape
    dtype = accumulator(x.dtype)
    return (
        x.new_empty(branches, channels, 3, 3, dtype=dtype),
        x.new_empty(branches, c_out, channels, dtype=dtype),
    )


def deferred_input_gradient(
    gradients: list[Tensor], x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> DeferredGradient:
    """That of x, from those of all depthwise maps, edge after edge: maps, or a stack of all."""
    arguments = (gradients, x, windows, list(dilations), stride)
    return DeferredGradient(x, partial(branches_input_gradient, *arguments))


@custom_op("lgcnet_fast::branches_input_gradient", mutates_args=())
def branches_input_gradient(
    gradients: list[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: list[int],
    stride: int,
    others: list[Tensor],
) -> Tensor:
    """See `deferred_input_gradient`; windows: (edges * B, 3, 3, C), others: added, like x."""
    launch = (x, by_edge(windows, dilations), dilations, stride, others)
    if len(gradients) == 1:
        return depthwise_input_gradient(by_edge(gradients[0], dilations), *launch)
    return depthwise_input_gradient(gradients, *launch)


@branches_input_gradient.register_fake
def _(
    gradients: list[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: list[int],
    stride: int,
    others: list[Tensor],
) -> Tensor:
    return empty_nhwc(x, x.shape)

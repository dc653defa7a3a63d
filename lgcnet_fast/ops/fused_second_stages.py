"""`second_stages` by the kernels of `mixed_norm_sum` and `separable_branches`.

Two launches take the statistics of all edges. What follows is, forward, to normalise, depthwise,
pointwise, and in the backward pass the same in reverse. Triton's kernels take all edges in one
launch each, and the depthwise ones normalise as they load (see normalised_depthwise.py). Where
products are left to the node (see products.py) the depthwise maps are the end of it. Small ones are
kept for the gradients of the products. With `cuda` the rest of an edge is a job beside those of the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lgcnet_fast.ops import fused_separable_branches
from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.constants import constant
from lgcnet_fast.ops.fused_depthwise_branches import multiplied_maps
from lgcnet_fast.ops.fused_mixed_norm_sum import mixed_sum, mixed_sum_backward, norm_statistics
from lgcnet_fast.ops.fused_mixed_norm_sum import refuse as refuse_norms
from lgcnet_fast.ops.fused_separable_branches import (
    depthwise_maps,
    separable_branches_backward,
    separable_maps,
    stacked_matrices,
    stacked_windows,
    weight_gradients,
)
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, nhwc, unstacked
from lgcnet_fast.ops.normalised_depthwise import (
    normalised_depthwise,
    normalised_depthwise_backward,
)
from lgcnet_fast.ops.products import SMALLEST, Entry, Products, pay


def refuse(
    backend: str,
    ys: Sequence[Tensor],
    norms: Sequence[nn.Module],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    to_sum: bool,
) -> str | None:
    """Why the kernels of `backend` cannot serve these arguments of `second_stages`."""
    branches = (ys[0], depthwise, pointwise, (1,), 1, (1,) * len(ys))
    of_norms = refuse_norms(backend, ys, ys[0], norms, range(len(ys)))
    return of_norms or fused_separable_branches.refuse(backend, *branches)


def run(
    backend: str,
    ys: Sequence[Tensor],
    norms: Sequence[nn.Module],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    to_sum: bool,
) -> list[list[Entry]]:
    """`second_stages`, see there: a stack of one map, or products, in each list."""
    later = to_sum and backend == "triton" and pay(ys[0], len(pointwise[0]))
    ys = [nhwc(y.to(computed_dtype(y))) for y in ys]
    statistics, training = norm_statistics(backend, ys, norms, plain=0)
    keeps = to_sum and backend == "triton" and _are_small(ys[0])
    settings = Settings(training, backend, keeps)
    own = () if later else pointwise
    maps = _SecondStages.apply(settings, statistics, len(ys), *ys, *depthwise, *own)
    if later:
        return [[Products(d, [p])] for d, p in zip(maps, pointwise, strict=True)]
    return [[y] for y in maps]


class Settings(NamedTuple):
    """What the edges have in common."""

    training: bool
    """Whether the statistics are the batch's."""
    backend: str
    keeps: bool
    """Whether depthwise maps are kept where products are made of them."""


def _are_small(y: Tensor) -> bool:
    """Whether a launch to make a depthwise map again costs more than to keep it: as `pay`."""
    maps = len(y) if y.ndim == 5 else 1
    return y.element_size() == 2 and y.numel() < maps * SMALLEST


class _SecondStages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Settings, statistics: Tensor, edges: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """statistics: (3, edges, C); the last tensors: weights, without pointwise ones where the
        depthwise maps are wanted."""
        ys, weights = tensors[:edges], tensors[edges:]
        windows, pointwise = stacked_windows(weights[:edges]), weights[edges:]
        matrices = stacked_matrices(pointwise, ys[0]) if pointwise else ys[0].new_empty(edges, 0)
        kept = (*ys, windows, matrices, statistics)
        if settings.backend == "triton":
            maps, filtered = _stages(settings, ys, windows, matrices, statistics)
        else:
            jobs = [partial(_stage, settings, *edge) for edge in _edges(kept)]
            maps, filtered = side_by_side(statistics.device, jobs), ys[0].new_empty(0)
        ctx.save_for_backward(*kept, filtered)
        ctx.settings, ctx.owners = settings, gradient_owners(weights)
        ctx.like = [(weight.dtype, weight.shape) for weight in weights[::edges]]
        return tuple(maps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *kept, filtered = ctx.saved_tensors
        gs, device = [nhwc(g) for g in gradients], gradients[0].device
        # Without pointwise weights, the last of found has nobody to go to.
        found: Sequence[Sequence[Tensor]]
        if ctx.settings.backend == "triton":
            *ys, windows, matrices, statistics = kept
            dxs, *of_weights = normalised_depthwise_backward(
                gs, unstacked(ys), windows, matrices, statistics, ctx.settings.training, filtered
            )
            dys = [dx.expand_as(y) for dx, y in zip(dxs, ys, strict=True)]
            found = [[gradient] for gradient in of_weights]
        else:
            jobs = [
                partial(_stage_gradients, ctx.settings, g, *edge)
                for g, edge in zip(gs, _edges(kept), strict=True)
            ]
            dys, *found = zip(*side_by_side(device, jobs), strict=True)
        settle(device, ctx.owners)
        weights = [
            gradient
            for of_edges, like in zip(found, ctx.like, strict=False)
            for of_edge in of_edges
            for gradient in weight_gradients(of_edge, *like)
        ]
        return None, None, None, *dys, *weights


def _stages(
    settings: Settings,
    ys: Sequence[Tensor],
    windows: Tensor,
    matrices: Tensor,
    statistics: Tensor,
) -> tuple[Sequence[Tensor], Tensor]:
    """By Triton: what the nodes or the norms receive, and the depthwise maps or nothing, to keep.

    Maps that nodes receive are kept there.
    """
    filtered, nothing = normalised_depthwise(unstacked(ys), windows, statistics), ys[0].new_empty(0)
    if not matrices.numel():
        return filtered.split(1), nothing
    maps = multiplied_maps(filtered[:, None], matrices)
    return maps.unbind(), filtered if settings.keeps else nothing


def _edges(kept: Sequence[Tensor]) -> Sequence[tuple[Tensor, ...]]:
    """(y, window, matrix, statistics) of each edge."""
    *ys, windows, matrices, statistics = kept
    every = zip(ys, windows.split(1), matrices.split(1), statistics.split(1, dim=1), strict=True)
    return list(every)


def _stage(
    settings: Settings, y: Tensor, window: Tensor, matrix: Tensor, statistics: Tensor
) -> Tensor:
    """By another backend: what the node receives of an edge."""
    _, (out,) = separable_maps(
        _normalised(settings, y, statistics), window, matrix, [1], 1, settings.backend
    )
    return out


def _stage_gradients(
    settings: Settings, g: Tensor, y: Tensor, window: Tensor, matrix: Tensor, statistics: Tensor
) -> tuple[Tensor, ...]:
    """Of y, window and matrix."""
    training, backend, _ = settings
    x = _normalised(settings, y, statistics)
    again = depthwise_maps(x, window, [1], 1, backend)
    dx, *weights = separable_branches_backward([g], again, x, window, matrix, [1], 1, backend)
    one = constant((1.0,), y.device)
    (dy,) = mixed_sum_backward(dx, [y], [], one, statistics, training, False, backend)
    return dy, *weights


def _normalised(settings: Settings, y: Tensor, statistics: Tensor) -> Tensor:
    one = constant((1.0,), y.device)
    return mixed_sum([y], [], one, statistics, settings.training, settings.backend)


FORMS = {
    backend: Implementation(partial(run, backend), partial(refuse, backend))
    for backend in ("triton", "cuda")
}

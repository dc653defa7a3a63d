"""Several convolutions of one map by a launch each way: what autograd needs for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.fan_out import added_to, handed_out
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, laid_like, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape


class Launches(NamedTuple):
    """x: NHWC; weights: of its dtype; gs: gradients of the results, NHWC."""

    results: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]
    """Of (x, weights)."""
    map_gradient: Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], Tensor]
    """Of (gs, x, weights): that of x, summed."""
    weight_gradients: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]
    """Of (gs, as many x, weights): a stack of them."""


def check_convolutions(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Raises `OperandError` unless all weights are (C_out, C, 3, 3), of one shape, beside x."""
    check_map("x", x)
    if not weights:
        raise OperandError("weights: need at least one")
    for index, weight in enumerate(weights):
        check_shape(f"weights[{index}]", weight, (len(weights[0]), x.shape[1], 3, 3))
        check_beside(f"weights[{index}]", weight, "x", x)


def convolutions_of_a_map(launches: Launches, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The results, in the dtype of autocast. Differentiable; keeps x and the weights."""
    x = nhwc(x.to(computed_dtype(x)))
    cast = (weight.to(x.dtype) for weight in weights)
    return list(_ConvolutionsOfAMap.apply(launches, handed_out(x), x, *cast))


class _ConvolutionsOfAMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, launches: Launches, defers: bool, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """defers: whether the gradient of x may be a `DeferredGradient`."""
        ctx.save_for_backward(x, *weights)
        ctx.launches, ctx.owners = launches, gradient_owners(weights)
        ctx.defers = defers
        return tuple(launches.results(x, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gs = [nhwc(g) for g in gradients]

        def of_map() -> list[Tensor]:
            return [ctx.launches.map_gradient(gs, x, weights)]

        def of_weights() -> list[Tensor]:
            dws = ctx.launches.weight_gradients(gs, [x] * len(gs), weights)
            return laid_like(weights, dws)

        jobs = [of_map] if ctx.needs_input_grad[2] else []
        found = side_by_side(x.device, jobs, [of_weights])
        settle(x.device, ctx.owners)
        dx = found[0][0] if jobs else None
        if dx is not None and ctx.defers and not torch.is_grad_enabled():
            dx = added_to(dx, x)
        return None, None, dx, *found[-1]

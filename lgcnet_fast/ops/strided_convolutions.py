"""3x3 convolutions of stride 2 of one map: the fused form takes all of them in one launch, their
gradients of the map, summed, in another, and those of the weights in a third."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.conv3_stride2_kernels import (
    GEOMETRY,
    strided_convolutions_forward,
    strided_weight_gradients,
    transposed_convolutions,
)
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal, laid_like, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape


def strided_convolutions(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """(N, C, H, W) -> (N, C_out, ceil(H / 2), ceil(W / 2)) with every weight, without bias.

    weights: (C_out, C, 3, 3), all of one shape. Also under autocast. Differentiable; keeps x and
    the weights.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("x", x)
    if not weights:
        raise OperandError("weights: need at least one")
    for index, weight in enumerate(weights):
        check_shape(f"weights[{index}]", weight, (len(weights[0]), x.shape[1], 3, 3))
        check_beside(f"weights[{index}]", weight, "x", x)
    result: list[Tensor] = _operation(x, tuple(weights))
    return result


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether the backend `triton` has a fused form for maps like x, before autocast."""
    from lgcnet_fast.kernels.conv3_stride2 import fits

    return fits(x.new_empty(0, dtype=computed_dtype(x)), weight)


def _reference(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [F.conv2d(x, weight, None, *GEOMETRY) for weight in weights]


def _apart(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return convolutions([x] * len(weights), weights, [Geometry(*GEOMETRY)] * len(weights))


def _run(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    if not fuses(x, weights[0]):
        return _apart(x, weights)
    x = nhwc(x.to(computed_dtype(x)))
    cast = [weight.to(x.dtype) for weight in weights]
    return list(_StridedConvolutions.apply(x, *cast))


class _StridedConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.owners = gradient_owners(weights)
        return tuple(strided_convolutions_forward(x, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gs = [nhwc(g) for g in gradients]
        jobs = []
        if ctx.needs_input_grad[0]:
            jobs.append(partial(_of_map, gs, x, weights))
        found = side_by_side(x.device, jobs, [partial(_of_weights, gs, x, weights)])
        settle(x.device, ctx.owners)
        dx = found[0][0] if jobs else None
        return dx, *found[-1]


def _of_map(gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [transposed_convolutions(gs, weights, x.shape[2:])]


def _of_weights(gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return laid_like(weights, strided_weight_gradients(gs, [x] * len(gs), weights))


_operation = Operation(
    "strided_convolutions",
    _reference,
    triton=Implementation(_run, lambda x, weights: dtype_refusal("x", x)),
    cuda=Implementation(_apart, lambda x, weights: dtype_refusal("x", x)),
    tuned_as="separable_branches",
)

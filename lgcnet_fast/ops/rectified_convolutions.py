"""3x3 convolutions of the ReLU of a map that several of them read.

The fused form takes all of them in one launch, which rectifies what it loads, and their gradients
of the map in another, summed and masked: relu(x) is never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation, supposing
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.conv3_kernels import (
    conv3_input_gradient,
    conv3_results,
    conv3_weight_gradients,
)
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal, laid_like, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape

GEOMETRY = Geometry(1, 1)


def rectified_convolutions(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The convolution of relu(x) with every weight, stride 1, padding 1, without bias.

    x: (N, C, H, W); weights: (C_out, C, 3, 3), all of one shape. Also under autocast.
    Differentiable; where `fuses` says so it keeps x and the weights only.

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


def fuses(x: Tensor, out_channels: int) -> bool:
    """Whether the backend `triton` has a fused form for maps like x, before autocast."""
    from lgcnet_fast.kernels import conv3 as kernel

    like = x.new_empty(0, x.shape[1], 1, 1, dtype=computed_dtype(x))
    if supposing():  # The device need not exist: one with matrix units.
        return kernel.fits(like, out_channels)
    return kernel.serves(like, out_channels)


def _reference(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    rectified = F.relu(x)
    return [F.conv2d(rectified, weight, padding=1) for weight in weights]


def _apart(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return convolutions([F.relu(x)] * len(weights), weights, [GEOMETRY] * len(weights))


def _run(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    if not fuses(x, len(weights[0])):
        return _apart(x, weights)
    x = nhwc(x.to(computed_dtype(x)))
    cast = [weight.to(x.dtype) for weight in weights]
    return list(_RectifiedConvolutions.apply(x, *cast))


class _RectifiedConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.owners = gradient_owners(weights)
        return tuple(conv3_results(x, weights, True))

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
    return [conv3_input_gradient(gs, x, weights, True)]


def _of_weights(gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    dw = conv3_weight_gradients(gs, [x] * len(gs), weights, True)
    return laid_like(weights, dw)


_operation = Operation(
    "rectified_convolutions",
    _reference,
    triton=Implementation(_run, lambda x, weights: dtype_refusal("x", x)),
    cuda=Implementation(_apart, lambda x, weights: dtype_refusal("x", x)),
    tuned_as="separable_branches",
)

"""1x1 convolution of the ReLU of a map, with bias, to the few channels of a classifier.

The fused form has neither ReLU nor bias as a pass of its own, either way. Of its gradients only
that of the map is waited for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.ops.backend import Implementation, Operation, supposing
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import accumulator, computed_dtype, dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape


def rectified_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv(relu(x), weight, bias), also under autocast.

    x: (N, C, H, W); weight: (K, C, 1, 1); bias: (K,). Differentiable; under Triton it keeps x and
    the weight, where 16-bit products of up to 32 channels out of up to 255 have kernels.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("x", x)
    check_shape("weight", weight, (len(weight), x.shape[1], 1, 1))
    check_shape("bias", bias, (len(weight),))
    check_beside("weight", weight, "x", x)
    check_beside("bias", bias, "x", x)
    result: Tensor = _operation(x, weight, bias)
    return result


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.relu(x), weight, bias)


def _run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not _fuses(x, len(weight)):
        return _reference(x, weight, bias)
    x = nhwc(x.to(computed_dtype(x)))
    y: Tensor = _RectifiedPointwise.apply(x, weight.to(x.dtype), bias.to(x.dtype))
    return y


def _fuses(x: Tensor, classes: int) -> bool:
    from lgcnet_fast.kernels import rectified_pointwise as kernel

    like = x.new_empty(0, x.shape[1], 1, 1, dtype=computed_dtype(x))
    if supposing():  # The device need not exist: one with matrix units.
        return like.dtype.itemsize == 2
    return kernel.serves(like, classes)


class _RectifiedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owners = gradient_owners([weight, bias])
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g = nhwc(gradient)
        jobs = [partial(_of_map, g, x, weight)] if ctx.needs_input_grad[0] else []
        *of_map, (dw, db) = side_by_side(x.device, jobs, [partial(_of_weights, g, x, weight)])
        settle(x.device, ctx.owners)
        return of_map[0][0] if of_map else None, dw, db


def _of_map(g: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    return [_input_gradient(g, x, weight)]


def _of_weights(g: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """As the weight lies in memory and dense, in its dtype, so that autograd need not copy them."""
    found = _weight_gradient(g, x)
    dw, db = torch.empty_like(weight), weight.new_empty(len(weight))
    torch._foreach_copy_([dw.flatten(1), db], [found[:, :-1], found[:, -1]])
    return [dw, db]


@custom_op("lgcnet_fast::rectified_pointwise", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from lgcnet_fast.kernels import rectified_pointwise as kernel

    return kernel.rectified_pointwise(x, _matrix(weight), bias)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return empty_nhwc(x, (len(x), len(weight), *x.shape[2:]))


@custom_op("lgcnet_fast::rectified_pointwise_input_gradient", mutates_args=())
def _input_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    from lgcnet_fast.kernels import rectified_pointwise as kernel

    return kernel.rectified_pointwise_input_grad(g, x, _matrix(weight))


@_input_gradient.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return empty_nhwc(x, x.shape)


@custom_op("lgcnet_fast::rectified_pointwise_weight_gradient", mutates_args=())
def _weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """(K, C + 1): of the weight, and of the bias behind it, in the accumulator's dtype."""
    from lgcnet_fast.kernels import rectified_pointwise as kernel

    return kernel.rectified_pointwise_weight_grad(g, x)


@_weight_gradient.register_fake
def _(g: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(g.shape[1], x.shape[1] + 1, dtype=accumulator(x.dtype))


def _matrix(weight: Tensor) -> Tensor:
    """(K, C, 1, 1) as (K, C), contiguous: a view of weights in either memory format."""
    return weight.flatten(1).contiguous()


_operation = Operation(
    "rectified_pointwise",
    _reference,
    triton=Implementation(_run, lambda x, weight, bias: dtype_refusal("x", x)),
    cuda=Implementation(_reference, lambda x, weight, bias: dtype_refusal("x", x)),
    tuned_as="separable_branches",
)

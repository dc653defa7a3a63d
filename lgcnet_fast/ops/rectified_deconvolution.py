"""Transposed 3x3 convolutions, stride 2, padding 1, of a ReLU: they double a map's sides.

The fused form rectifies what it loads, and masks the gradient as it stores it: relu(x) is never
written.
"""

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
    strided_convolutions_forward,
    strided_weight_gradients,
    transposed_convolutions,
)
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal, laid_like, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape


def rectified_deconvolution(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """Of relu(x), (N, C, H, W) -> (N, C_out, *size), without bias, also under autocast.

    weight: (C, C_out, 3, 3); size: 2 n - 1 or 2 n for each side n. Differentiable; keeps x and the
    weight, the reference relu(x) too. Under Triton kernels serve 16-bit maps.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("x", x)
    if weight.ndim != 4:
        raise OperandError(f"weight: shape {tuple(weight.shape)}, need ({x.shape[1]}, c_out, 3, 3)")
    check_shape("weight", weight, (x.shape[1], weight.shape[1], 3, 3))
    check_beside("weight", weight, "x", x)
    if [-(-length // 2) for length in size] != list(x.shape[2:]):
        raise OperandError(f"size: {tuple(size)}, need 2 n - 1 or 2 n of {tuple(x.shape[2:])}")
    result: Tensor = _operation(x, weight, tuple(size))
    return result


def _reference(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    beyond = [1 - length % 2 for length in size]
    return F.conv_transpose2d(F.relu(x), weight, None, 2, padding=1, output_padding=beyond)


def _run(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    from lgcnet_fast.kernels.conv3_stride2 import fits

    dtype = computed_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if not fits(x, weight):
        return _reference(x, weight, size)
    result: Tensor = _RectifiedDeconvolution.apply(nhwc(x), weight, size)
    return result


class _RectifiedDeconvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owners = gradient_owners([weight])
        return transposed_convolutions([x], [weight], size, True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        g = nhwc(gradient)
        jobs = []
        if ctx.needs_input_grad[0]:
            jobs.append(partial(strided_convolutions_forward, g, [weight], x))
        found = side_by_side(x.device, jobs, [partial(_of_weight, g, x, weight)])
        settle(x.device, ctx.owners)
        dx = found[0][0] if jobs else None
        return dx, found[-1][0], None


def _of_weight(g: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    return laid_like([weight], strided_weight_gradients([x], [g], [weight], True))


def _refuse(x: Tensor, weight: Tensor, size: tuple[int, int]) -> str | None:
    return dtype_refusal("x", x)


_operation = Operation(
    "rectified_deconvolution",
    _reference,
    triton=Implementation(_run, _refuse),
    cuda=Implementation(_reference, _refuse),
    tuned_as="separable_branches",
)

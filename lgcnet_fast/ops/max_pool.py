"""Max pooling 3x3 with padding 1: the candidate `max3` without its batch norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.maps import dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.operands import check_map


def max_pool(x: Tensor, stride: int = 1) -> Tensor:
    """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)) for stride 1 or 2.

    The first maximum of a window, row by row, takes its gradient; NaN counts as the greatest. The
    fused form keeps x for the backward pass and finds the maxima anew; the reference keeps x and a
    64-bit index an output.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("x", x)
    if stride not in (1, 2):
        raise OperandError(f"stride: {stride}, need 1 or 2")
    result: Tensor = _operation(x, stride)
    return result


def _reference(x: Tensor, stride: int) -> Tensor:
    return F.max_pool2d(x, 3, stride, padding=1)


def _run(x: Tensor, stride: int) -> Tensor:
    result: Tensor = _max_pool(nhwc(x), stride)
    return result


def _refuse(x: Tensor, stride: int) -> str | None:
    return dtype_refusal("x", x)


@custom_op("lgcnet_fast::max_pool", mutates_args=())
def _max_pool(x: Tensor, stride: int) -> Tensor:
    from lgcnet_fast.kernels.max_pool import max_pool_forward

    return max_pool_forward(x, stride)


@_max_pool.register_fake
def _(x: Tensor, stride: int) -> Tensor:
    *outer, height, width = x.shape
    return empty_nhwc(x, (*outer, -(-height // stride), -(-width // stride)))


@custom_op("lgcnet_fast::max_pool_backward", mutates_args=())
def _max_pool_backward(x: Tensor, gradient: Tensor, stride: int) -> Tensor:
    from lgcnet_fast.kernels.max_pool import max_pool_backward

    return max_pool_backward(x, gradient, stride)


@_max_pool_backward.register_fake
def _(x: Tensor, gradient: Tensor, stride: int) -> Tensor:
    return empty_nhwc(x, x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.stride = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return _max_pool_backward(x, nhwc(gradient), ctx.stride), None


_max_pool.register_autograd(_backward, setup_context=_keep)
_operation = Operation("max_pool", _reference, triton=Implementation(_run, _refuse))

"""Max pooling 3x3 with padding 1: the candidate `max3` without its batch norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.maps import dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.operands import check_map
from lgcnet_fast.ops.tuning import shape_key, tuned


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


def _run(backend: str, x: Tensor, stride: int) -> Tensor:
    result: Tensor = _max_pool(nhwc(x), stride, backend)
    return result


def _refuse(backend: str, x: Tensor, stride: int) -> str | None:
    if backend == "cuda" and x.dtype == torch.float64:
        return "its kernels have no float64"
    return dtype_refusal("x", x)


@custom_op("lgcnet_fast::max_pool", mutates_args=())
def _max_pool(x: Tensor, stride: int, backend: str) -> Tensor:
    if backend == "cuda":
        from lgcnet_fast.native import max_pool as native

        return native.max_pool_forward(x, stride)
    from lgcnet_fast.kernels.max_pool import PoolConfig, max_pool_forward

    shape = _pooled_shape(x, stride)
    config = _tuned(PoolConfig.forward(shape), "max_pool_forward", x, stride)
    return max_pool_forward(x, stride, config)


@_max_pool.register_fake
def _(x: Tensor, stride: int, backend: str) -> Tensor:
    return empty_nhwc(x, _pooled_shape(x, stride))


@custom_op("lgcnet_fast::max_pool_backward", mutates_args=())
def _max_pool_backward(x: Tensor, gradient: Tensor, stride: int, backend: str) -> Tensor:
    if backend == "cuda":
        from lgcnet_fast.native import max_pool as native

        return native.max_pool_backward(x, gradient, stride)
    from lgcnet_fast.kernels.max_pool import PoolConfig, max_pool_backward

    default = PoolConfig.backward(tuple(gradient.shape))
    config = _tuned(default, "max_pool_backward", x, stride)
    return max_pool_backward(x, gradient, stride, config)


@_max_pool_backward.register_fake
def _(x: Tensor, gradient: Tensor, stride: int, backend: str) -> Tensor:
    return empty_nhwc(x, x.shape)


def _pooled_shape(x: Tensor, stride: int) -> tuple[int, ...]:
    *outer, height, width = x.shape
    return *outer, -(-height // stride), -(-width // stride)


def _tuned(default: Any, launch: str, x: Tensor, stride: int) -> Any:
    """The tile that the tuning table of the device has for a launch."""
    return tuned(default, launch, shape_key(x.dtype, x.shape, (stride,)), x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.stride, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return _max_pool_backward(x, nhwc(gradient), ctx.stride, ctx.backend), None, None


_max_pool.register_autograd(_backward, setup_context=_keep)
_operation = Operation(
    "max_pool",
    _reference,
    **{
        backend: Implementation(partial(_run, backend), partial(_refuse, backend))
        for backend in ("triton", "cuda")
    },
)

"""Max pooling 3x3 with padding 1: the candidate `max3` without its batch norm."""

from __future__ import annotations

from collections.abc import Callable
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
from lgcnet_fast.ops.recompute import Recomputable, recomputable
from lgcnet_fast.ops.tuning import shape_key, tuned

Way = Callable[[], Tensor]


def max_pool(x: Tensor, stride: int = 1) -> Tensor:
    """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)) for stride 1 or 2.

    The first maximum of a window, row by row, takes its gradient; NaN counts as the greatest. For
    the backward pass Triton's form keeps a byte an output, that of `cuda` x; the reference keeps x
    and a 64-bit index an output.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    _check(x, stride)
    result: Tensor = _operation(x, stride)
    return result


def recomputable_max_pool(x: Tensor, stride: int = 1) -> tuple[Tensor, Way | None]:
    """max_pool(x, stride), and the way to compute it again going backward, `remembered`.

    None for Triton's form: a map and its bytes take less than the launch in front of a node's
    backward pass. Raises as `max_pool`.
    """
    _check(x, stride)
    result: tuple[Tensor, Way | None] = _recomputable(x, stride)
    return result


def _check(x: Tensor, stride: int) -> None:
    """Raises `OperandError`."""
    check_map("x", x)
    if stride not in (1, 2):
        raise OperandError(f"stride: {stride}, need 1 or 2")


def _reference(x: Tensor, stride: int) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=stride, padding=1)


def _recomputable_reference(x: Tensor, stride: int) -> Recomputable:
    return recomputable(partial(_reference, stride=stride), x)


def _run(backend: str, x: Tensor, stride: int) -> Tensor:
    x = nhwc(x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _max_pool(x, stride, backend)
    form = _WinnersKept if backend == "triton" else _MapKept
    result: Tensor = form.apply(x, stride)
    return result


def _run_recomputable(backend: str, x: Tensor, stride: int) -> tuple[Tensor, Way | None]:
    if backend == "triton":
        return _run(backend, x, stride), None
    return recomputable(partial(_run, backend, stride=stride), x)


def _refuse(backend: str, x: Tensor, stride: int) -> str | None:
    if backend == "cuda" and x.dtype == torch.float64:
        return "its kernels have no float64"
    return dtype_refusal("x", x)


class _MapKept(torch.autograd.Function):
    """By the backend `cuda`, whose gradient searches again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stride = stride
        return _max_pool(x, stride, "cuda")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _max_pool_backward(x, nhwc(gradient), *x.shape[2:], ctx.stride, "cuda"), None


class _WinnersKept(torch.autograd.Function):
    """By Triton's kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        pooled, winners = _max_pool_winners(x, stride)
        ctx.save_for_backward(winners)
        ctx.size, ctx.stride = x.shape[2:], stride
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (winners,) = ctx.saved_tensors
        arguments = (winners, nhwc(gradient), *ctx.size, ctx.stride, "triton")
        return _max_pool_backward(*arguments), None


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


@custom_op("lgcnet_fast::max_pool_winners", mutates_args=())
def _max_pool_winners(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The pooled map, and for each of its elements where in the window the maximum is, in Triton.

    The second is uint8, half as large as a map in half precision.
    """
    from lgcnet_fast.kernels.max_pool import PoolConfig, max_pool_winners

    config = _tuned(PoolConfig.forward(_pooled_shape(x, stride)), "max_pool_forward", x, stride)
    return max_pool_winners(x, stride, config)


@_max_pool_winners.register_fake
def _(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    shape = _pooled_shape(x, stride)
    return empty_nhwc(x, shape), empty_nhwc(x.new_empty(0, dtype=torch.uint8), shape)


@custom_op("lgcnet_fast::max_pool_backward", mutates_args=())
def _max_pool_backward(
    kept: Tensor, gradient: Tensor, height: int, width: int, stride: int, backend: str
) -> Tensor:
    """The gradient of x: (N, C, height, width). kept: the winners; x for the backend `cuda`."""
    if backend == "cuda":
        from lgcnet_fast.native import max_pool as native

        return native.max_pool_backward(kept, gradient, stride)
    from lgcnet_fast.kernels.max_pool import PoolConfig, max_pool_backward

    default = PoolConfig.backward(tuple(gradient.shape))
    key = shape_key(gradient.dtype, (*gradient.shape[:2], height, width), (stride,))
    config = tuned(default, "max_pool_backward", key, gradient.device)
    return max_pool_backward(kept, gradient, (height, width), stride, config)


@_max_pool_backward.register_fake
def _(kept: Tensor, gradient: Tensor, height: int, width: int, stride: int, backend: str) -> Tensor:
    return empty_nhwc(gradient, (*gradient.shape[:2], height, width))


def _pooled_shape(x: Tensor, stride: int) -> tuple[int, ...]:
    *outer, height, width = x.shape
    return *outer, -(-height // stride), -(-width // stride)


def _tuned(default: Any, launch: str, x: Tensor, stride: int) -> Any:
    """The tile that the tuning table of the device has for a launch."""
    return tuned(default, launch, shape_key(x.dtype, x.shape, (stride,)), x.device)


_operation, _recomputable = (
    Operation(
        name,
        reference,
        **{
            backend: Implementation(partial(run, backend), partial(_refuse, backend))
            for backend in ("triton", "cuda")
        },
        tuned_as="max_pool",
    )
    for name, reference, run in (
        ("max_pool", _reference, _run),
        ("recomputable_max_pool", _recomputable_reference, _run_recomputable),
    )
)

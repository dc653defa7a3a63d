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
from lgcnet_fast.ops.fan_out import AT_ONCE
from lgcnet_fast.ops.maps import empty_nhwc, nhwc, refusal_by
from lgcnet_fast.ops.operands import check_map
from lgcnet_fast.ops.recompute import Remembered, recomputable
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


def max_pools(x: Tensor, stride: int = 1) -> tuple[list[Tensor], Way | None]:
    """max_pool(x, stride), computed once, for each of AT_ONCE readers, and the way to compute it
    again going backward, `Remembered`.

    The fused form sums the gradients of all readers where it computes that of x. No way for
    Triton's form: a map and its bytes take less than the launch in front of a node's backward
    pass. Raises as `max_pool`.
    """
    _check(x, stride)
    result: tuple[list[Tensor], Way | None] = _for_readers(x, stride)
    return result


def _check(x: Tensor, stride: int) -> None:
    """Raises `OperandError`."""
    check_map("x", x)
    if stride not in (1, 2):
        raise OperandError(f"stride: {stride}, need 1 or 2")


def _reference(x: Tensor, stride: int) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=stride, padding=1)


def _reference_for_readers(x: Tensor, stride: int) -> tuple[list[Tensor], Way]:
    pooled, again = recomputable(partial(_reference, stride=stride), x)
    return [pooled] * AT_ONCE, again


def _run(backend: str, x: Tensor, stride: int) -> Tensor:
    return _run_for_readers(backend, x, stride)[0][0]


def _run_for_readers(backend: str, x: Tensor, stride: int) -> tuple[list[Tensor], Way | None]:
    x = nhwc(x)
    again = Remembered(partial(_max_pool, stride=stride, backend=backend), x)
    way = None if backend == "triton" else again
    if not (x.requires_grad and torch.is_grad_enabled()):
        return [_max_pool(x, stride, backend)] * AT_ONCE, way
    return list(_MaxPool.apply(x, stride, backend)), way


def _refuse(backend: str, x: Tensor, stride: int) -> str | None:
    return refusal_by(backend, "x", x)


class _MaxPool(torch.autograd.Function):
    """AT_ONCE aliases of the pooled map. Triton's form keeps the winners, the other one x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, backend: str) -> tuple[Tensor, ...]:
        if backend == "triton":
            pooled, kept = _max_pool_winners(x, stride)
        else:
            pooled, kept = _max_pool(x, stride, backend), x
        ctx.save_for_backward(kept)
        ctx.about = *x.shape[2:], stride, backend
        ctx.set_materialize_grads(False)
        return tuple(pooled.detach() for _ in range(AT_ONCE))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        (kept,) = ctx.saved_tensors
        arrived = [nhwc(g) for g in gradients if g is not None]
        return _max_pool_backward(kept, arrived, *ctx.about) if arrived else None, None, None


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
    kept: Tensor, gradients: list[Tensor], height: int, width: int, stride: int, backend: str
) -> Tensor:
    """The gradient of x: (N, C, height, width). kept: the winners; x for the backend `cuda`.

    gradients: those of the readers of the pooled map, at least one.
    """
    gradient = gradients[0]
    if backend == "cuda":
        from lgcnet_fast.native import gradient_sum, max_pool

        if len(gradients) > 1:
            gradient = gradient_sum.gradient_sum(gradients, gradient, relu=False)
        return max_pool.max_pool_backward(kept, gradient, stride)
    from lgcnet_fast.kernels.max_pool import PoolConfig, max_pool_backward

    default = PoolConfig.backward(tuple(gradient.shape))
    key = shape_key(gradient.dtype, (*gradient.shape[:2], height, width), (stride,))
    config = tuned(default, "max_pool_backward", key, gradient.device)
    return max_pool_backward(kept, gradients, (height, width), stride, config)


@_max_pool_backward.register_fake
def _(
    kept: Tensor, gradients: list[Tensor], height: int, width: int, stride: int, backend: str
) -> Tensor:
    return empty_nhwc(gradients[0], (*gradients[0].shape[:2], height, width))


def _pooled_shape(x: Tensor, stride: int) -> tuple[int, ...]:
    *outer, height, width = x.shape
    return *outer, -(-height // stride), -(-width // stride)


def _tuned(default: Any, launch: str, x: Tensor, stride: int) -> Any:
    """The tile that the tuning table of the device has for a launch."""
    return tuned(default, launch, shape_key(x.dtype, x.shape, (stride,)), x.device)


_operation, _for_readers = (
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
        ("max_pools", _reference_for_readers, _run_for_readers),
    )
)

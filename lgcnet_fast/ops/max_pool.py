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
from lgcnet_fast.ops.lanes import keep_until_joined
from lgcnet_fast.ops.maps import dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.operands import check_map
from lgcnet_fast.ops.readers import AT_ONCE
from lgcnet_fast.ops.recompute import Recomputable, recomputable
from lgcnet_fast.ops.tuning import shape_key, tuned


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


def recomputable_max_pools(x: Tensor, stride: int = 1) -> list[Recomputable]:
    """max_pool(x, stride), computed once, for each of AT_ONCE readers, whose gradients are summed
    together, and the way to compute it again going backward, `remembered`.

    The fused form keeps x. Where that way is taken, the gradient of x needs no search of its own.
    Raises as `max_pool`.
    """
    _check(x, stride)
    result: list[Recomputable] = _recomputable(x, stride)
    return result


def _check(x: Tensor, stride: int) -> None:
    """Raises `OperandError`."""
    check_map("x", x)
    if stride not in (1, 2):
        raise OperandError(f"stride: {stride}, need 1 or 2")


def _reference(x: Tensor, stride: int) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=stride, padding=1)


def _recomputable_reference(x: Tensor, stride: int) -> list[Recomputable]:
    return [recomputable(partial(_reference, stride=stride), x)] * AT_ONCE


def _run(backend: str, x: Tensor, stride: int) -> Tensor:
    if backend == "triton" and x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _WinnersKept.apply(nhwc(x), stride)
        return result
    return _run_recomputable(backend, x, stride)[0][0]


def _run_recomputable(backend: str, x: Tensor, stride: int) -> list[Recomputable]:
    x, again = nhwc(x), _Again(stride, backend)
    way = partial(again.pooled, x.detach())
    return [(pooled, way) for pooled in _MaxPool.apply(x, again)]


def _refuse(backend: str, x: Tensor, stride: int) -> str | None:
    if backend == "cuda" and x.dtype == torch.float64:
        return "its kernels have no float64"
    return dtype_refusal("x", x)


class _Again:
    """The second computation of a pooled map, by which the gradient learns the winners.

    Whoever comes first computes; the gradient of x comes last.
    """

    def __init__(self, stride: int, backend: str) -> None:
        self._stride, self._backend = stride, backend
        self._found: tuple[Tensor, Tensor] | None = None
        """The map, and what its gradient needs."""

    def first(self, x: Tensor) -> Tensor:
        return _max_pool(x, self._stride, self._backend)

    def pooled(self, x: Tensor) -> Tensor:
        return self._computed(x)[0]

    def gradient(self, x: Tensor, gradients: list[Tensor]) -> Tensor:
        kept = x if self._backend == "cuda" else self._computed(x)[1]
        if self._found is not None:
            keep_until_joined(*self._found)
            self._found = None
        return _max_pool_backward(
            kept, gradients, x.shape[2], x.shape[3], self._stride, self._backend
        )

    def _computed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._found is None:
            if self._backend == "cuda":
                self._found = self.first(x), x
            else:
                self._found = _max_pool_winners(x, self._stride)
        return self._found


class _MaxPool(torch.autograd.Function):
    """AT_ONCE aliases of the pooled map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, again: _Again) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.again = again
        ctx.set_materialize_grads(False)
        pooled = again.first(x)
        return tuple(pooled.detach() for _ in range(AT_ONCE))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        arrived = [nhwc(g) for g in gradients if g is not None]
        return ctx.again.gradient(x, arrived) if arrived else None, None


class _WinnersKept(torch.autograd.Function):
    """By Triton's kernels, for a map that need not be computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        pooled, winners = _max_pool_winners(x, stride)
        ctx.save_for_backward(winners)
        ctx.size, ctx.stride = x.shape[2:], stride
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (winners,) = ctx.saved_tensors
        arguments = (winners, [nhwc(gradient)], *ctx.size, ctx.stride, "triton")
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
    kept: Tensor, gradients: list[Tensor], height: int, width: int, stride: int, backend: str
) -> Tensor:
    """The gradient of x: (N, C, height, width). kept: the winners; x for the backend `cuda`.

    gradients: those of the readers of the pooled map, at least one.
    """
    gradient = gradients[0]
    if backend == "cuda":
        from lgcnet_fast.native import max_pool as native

        return native.max_pool_backward(kept, sum(gradients[1:], start=gradient), stride)
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
        ("recomputable_max_pools", _recomputable_reference, _run_recomputable),
    )
)

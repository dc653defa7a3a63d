"""Aliases of a map for its readers, whose gradients arrive together and are summed in one launch.

Autograd adds the gradients that meet at a map pair by pair, and masks those that come through a
ReLU by another launch: here it is `lgcnet_fast::gradient_sum`. If the launch that computes one of
them can add the others, it does so instead (see deferred_gradient.py); if one is nobody else's, the
others are added in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.ops.deferred_gradient import DeferredGradient
from lgcnet_fast.ops.maps import empty_nhwc, nhwc

AT_ONCE = 8
"""Readers whose gradients are summed together; one that gives no gradient costs nothing."""


def aliases(x: Tensor, backend: str) -> list[Tensor]:
    """x for AT_ONCE readers, whose gradients are summed together."""
    return list(_FanOut.apply(x, False, False, backend))


def rectified_aliases(x: Tensor, keeps_relu: bool, backend: str) -> list[Tensor]:
    """relu(x) for AT_ONCE readers; keeps_relu: instead of x, for the backward pass."""
    return list(_FanOut.apply(x, True, keeps_relu, backend))


def handed_out(x: Tensor) -> bool:
    """Whether x is one of `aliases`, so that its gradient should be a `DeferredGradient`."""
    node = x.grad_fn
    of_triton = isinstance(node, _FanOut._backward_cls) and node.backend == "triton"
    return of_triton and not node.relu


def added_to(dx: Tensor, x: Tensor) -> DeferredGradient:
    """dx, a gradient of x that nobody else holds: others of x are added where it lies."""
    return DeferredGradient(dx, partial(_with_others, dx), _storage(x))


def _with_others(dx: Tensor, others: Sequence[Tensor]) -> Tensor:
    if others:
        add_gradients(dx, list(others))
    return dx


@custom_op("lgcnet_fast::add_gradients", mutates_args=("dx",))
def add_gradients(dx: Tensor, others: list[Tensor]) -> None:
    """Others, like dx, to dx: NHWC."""
    from lgcnet_fast.kernels import gradient_sum as kernel

    kernel.gradient_sum([dx, *others], dx, relu=False, out=dx)


@add_gradients.register_fake
def _(dx: Tensor, others: list[Tensor]) -> None:
    return None


class _FanOut(torch.autograd.Function):
    """AT_ONCE aliases of x, or of relu(x), which tells as well as x where its gradient passes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, relu: bool, keeps_relu: bool, backend: str
    ) -> tuple[Tensor, ...]:
        value = F.relu(x) if relu else x
        ctx.save_for_backward(value if keeps_relu else x)
        ctx.relu, ctx.backend = relu, backend
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for _ in range(AT_ONCE))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        arrived = [g for g in gradients if g is not None]
        if len(arrived) == 1 and not ctx.relu:
            return arrived[0], None, None, None
        if not ctx.relu and (deferred := _deferred(arrived, x)) is not None:
            others = [nhwc(g) for g in arrived if g is not deferred]
            return deferred.plus(others), None, None, None
        arrived = [nhwc(g) for g in arrived]
        return gradient_sum(arrived, nhwc(x), ctx.relu, ctx.backend), None, None, None


def _deferred(gradients: Sequence[Tensor], x: Tensor) -> DeferredGradient | None:
    """One that can be given the others of x; rather one whose own launch adds them."""
    deferred = [g for g in gradients if isinstance(g, DeferredGradient)]
    launches = (g for g in deferred if g.computed_for is None)
    places = (g for g in deferred if g.computed_for == _storage(x))
    return next(chain(launches, places), None)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@custom_op("lgcnet_fast::gradient_sum", mutates_args=())
def gradient_sum(gradients: list[Tensor], x: Tensor, relu: bool, backend: str) -> Tensor:
    """Gradient of x from those of its readers or, with `relu`, of the readers of relu(x)."""
    if backend == "cuda":
        from lgcnet_fast.native import gradient_sum as native

        return native.gradient_sum(gradients, x, relu)
    from lgcnet_fast.kernels import gradient_sum as kernel

    return kernel.gradient_sum(gradients, x, relu)


@gradient_sum.register_fake
def _(gradients: list[Tensor], x: Tensor, relu: bool, backend: str) -> Tensor:
    return empty_nhwc(x, x.shape)

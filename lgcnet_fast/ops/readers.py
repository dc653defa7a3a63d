"""A map that several operations read: its gradients are summed in one launch.

Autograd adds the gradients that meet at a map pair by pair, and masks those that come through a
ReLU by another launch. The fused form hands every reader its own alias of the map, so that all
gradients arrive together: `lgcnet_fast::gradient_sum`. If the launch that computes one of them can
add the others, it does so instead (see deferred_gradient.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.deferred_gradient import DeferredGradient
from lgcnet_fast.ops.maps import dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.recompute import Recomputable, recomputed, remembered
from lgcnet_fast.ops.rectified_convolutions import fuses
from lgcnet_fast.ops.strided_convolutions import fuses as fuses_strided

T = TypeVar("T")
AT_ONCE = 8
"""Readers whose gradients are summed together; one that gives no gradient costs nothing."""


class Readers:
    """Hands out x and relu(x), which is computed once: the plain form, which keeps relu(x)."""

    def __init__(self, x: Tensor, only_rectified: bool = False) -> None:
        self.x = x

    def plain(self) -> Tensor:
        """x, for one reader."""
        return self.x

    def rectified(self, function: Callable[[Tensor], T]) -> T:
        """function(relu(x))."""
        return rectified_together([self], lambda values: function(*values))

    def rectify(self) -> tuple[Tensor, list[Recomputable]]:
        """relu(x), for one reader, and how to compute it again if it need not be kept."""
        return self._relu, []

    def fuses(self, out_channels: int) -> bool:
        """Whether 3x3 convolutions to so many channels should be `rectified_convolutions` of x."""
        return False

    def strides(self, weight: Tensor) -> bool:
        """Whether the fused forms of 3x3 convolutions of stride 2 should take such weights."""
        return False

    @property
    def reads_itself(self) -> bool:
        """Whether what reads relu(x) best rectifies x itself, where it can."""
        return False

    @cached_property
    def _relu(self) -> Tensor:
        return F.relu(self.x)


class SummedReaders(Readers):
    """The fused form: keeps x, which others keep too, and rectifies it again when going backward.

    Where x is `only_rectified`, it keeps relu(x) instead, so that nothing is computed again.

    The readers of relu(x) together are one reader of x, so that few gradients are in memory at
    once.
    """

    def __init__(self, backend: str, x: Tensor, only_rectified: bool = False) -> None:
        super().__init__(x)
        self._backend = backend
        self._only_rectified = only_rectified
        self._plain: list[Tensor] = []
        self._rectified: list[Tensor] = []
        self._again = remembered(F.relu, x)

    def plain(self) -> Tensor:
        if not self._plain:
            self._plain = aliases(self.x, self._backend)
        return self._plain.pop()

    def rectify(self) -> tuple[Tensor, list[Recomputable]]:
        if not self._rectified:
            x = self.x if self._only_rectified else self.plain()
            self._rectified += _FanOut.apply(x, True, self._only_rectified, self._backend)
        value = self._rectified.pop()
        return value, [] if self._only_rectified else [(value, self._again)]

    def fuses(self, out_channels: int) -> bool:
        return self.reads_itself and fuses(self.x, out_channels)

    def strides(self, weight: Tensor) -> bool:
        return self._backend == "triton" and fuses_strided(self.x, weight)

    @property
    def reads_itself(self) -> bool:
        return self._backend == "triton" and not self._only_rectified


def aliases(x: Tensor, backend: str) -> list[Tensor]:
    """x for AT_ONCE readers, whose gradients are summed together."""
    return list(_FanOut.apply(x, False, False, backend))


def handed_out(x: Tensor) -> bool:
    """Whether x is such an alias, so that its gradient should be a `DeferredGradient`."""
    return isinstance(x.grad_fn, _FanOut._backward_cls)


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
        if not ctx.relu and (deferred := _deferred(arrived)) is not None:
            others = [nhwc(g) for g in arrived if g is not deferred]
            return deferred.plus(others), None, None, None
        arrived = [nhwc(g) for g in arrived]
        return _gradient_sum(arrived, nhwc(x), ctx.relu, ctx.backend), None, None, None


def _deferred(gradients: Sequence[Tensor]) -> DeferredGradient | None:
    return next((g for g in gradients if isinstance(g, DeferredGradient)), None)


@custom_op("lgcnet_fast::gradient_sum", mutates_args=())
def _gradient_sum(gradients: list[Tensor], x: Tensor, relu: bool, backend: str) -> Tensor:
    """Gradient of x from those of its readers or, with `relu`, of the readers of relu(x)."""
    if backend == "cuda":
        return pairwise_sum(gradients, x, relu)
    from lgcnet_fast.kernels.gradient_sum import gradient_sum

    return gradient_sum(gradients, x, relu)


@_gradient_sum.register_fake
def _(gradients: list[Tensor], x: Tensor, relu: bool, backend: str) -> Tensor:
    return empty_nhwc(x, x.shape)


def pairwise_sum(gradients: Sequence[Tensor], x: Tensor, relu: bool) -> Tensor:
    """By PyTorch's own kernels: the extension has none for it."""
    total = gradients[0].clone() if len(gradients) == 1 else gradients[0] + gradients[1]
    for g in gradients[2:]:
        total += g
    return torch.ops.aten.threshold_backward(total, x, 0) if relu else total


def rectified_together(several: Sequence[Readers], function: Callable[[Sequence[Tensor]], T]) -> T:
    """function of the relu(x) of each of these, which may come repeatedly."""
    values, ways = zip(*(one.rectify() for one in several), strict=True)
    if not any(ways):  # What compilers trace holds no hooks.
        return function(values)
    with recomputed(*(way for own in ways for way in own)):
        return function(values)


def readers(x: Tensor, only_rectified: bool = False) -> Readers:
    """The readers of a map x: (N, C, H, W). only_rectified: none of them takes it plain."""
    chosen: Readers = _readers(x, only_rectified)
    return chosen


_readers = Operation(
    "readers",
    Readers,
    **{
        backend: Implementation(
            partial(SummedReaders, backend), lambda x, only_rectified: dtype_refusal("x", x)
        )
        for backend in ("triton", "cuda")
    },
    tuned_as="separable_branches",
)

"""The concatenation of two maps that several operations read, rectified by all of them or not.

Where all rectify it, the fused form concatenates and rectifies in one launch, and in another sums
the gradients of all readers, masks the sum and takes it apart.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.concat_pair import (
    check_pair,
    concat_pair,
    concatenated,
    refuse_pair,
    taken_apart,
)
from lgcnet_fast.ops.fan_out import AT_ONCE, aliases
from lgcnet_fast.ops.maps import nhwc
from lgcnet_fast.ops.readers import Readers, readers
from lgcnet_fast.ops.recompute import Recomputable


def pair_readers(first: Tensor, second: Tensor, only_rectified: bool = False) -> Readers:
    """The readers of concat(first, second): (N, 2C, H, W) of two maps (N, C, H, W).

    only_rectified: none of them takes it plain. Raises as `concat_pair` does.
    """
    if not only_rectified:
        return readers(concat_pair(first, second))
    check_pair(first, second)
    chosen: Readers = _rectified_pair(first, second)
    return chosen


class RectifiedPair(Readers):
    """The fused form, which makes and keeps relu(concat) alone."""

    def __init__(self, backend: str, first: Tensor, second: Tensor) -> None:
        self._backend = backend
        self._left = list(_RectifiedPair.apply(nhwc(first), nhwc(second), backend))

    def plain(self) -> Tensor:
        raise AssertionError("this map was promised to be read rectified only")

    def rectify(self) -> tuple[Tensor, list[Recomputable]]:
        if len(self._left) == 1:
            self._left = aliases(self._left[0], self._backend)
        return self._left.pop(), []


class _RectifiedPair(torch.autograd.Function):
    """AT_ONCE aliases of relu(concat)."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, backend: str) -> tuple[Tensor, ...]:
        y = concatenated(first, second, True, backend)
        ctx.save_for_backward(y)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return tuple(y.detach() for _ in range(AT_ONCE))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        arrived = [nhwc(g) for g in gradients if g is not None]
        return *taken_apart(arrived, y, True, ctx.backend), None


def _reference(first: Tensor, second: Tensor) -> Readers:
    return Readers(torch.cat((first, second), dim=1))


_rectified_pair = Operation(
    "rectified_pair",
    _reference,
    **{
        backend: Implementation(partial(RectifiedPair, backend), partial(refuse_pair, backend))
        for backend in ("triton", "cuda")
    },
    tuned_as="separable_branches",
)

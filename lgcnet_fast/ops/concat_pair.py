"""The concatenation of two maps, and its gradient, each in one launch and NHWC memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.fan_out import gradient_sum
from lgcnet_fast.ops.maps import empty_nhwc, nhwc, refusal_by
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape


def concat_pair(first: Tensor, second: Tensor) -> Tensor:
    """(N, 2C, H, W) of two maps (N, C, H, W).

    Autograd hands out the gradients of both as parts of one map, which every kernel that reads them
    has to copy before; the fused form gives each in NHWC memory of its own.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_pair(first, second)
    result: Tensor = _operation(first, second)
    return result


def check_pair(first: Tensor, second: Tensor) -> None:
    """Raises `OperandError` unless these are maps of one shape, on one device."""
    check_map("first", first)
    check_map("second", second)
    check_shape("second", second, tuple(first.shape))
    check_beside("second", second, "first", first)


def refuse_pair(backend: str, first: Tensor, second: Tensor) -> str | None:
    """Why the kernels of `backend` cannot concatenate these maps."""
    if first.dtype != second.dtype:
        return f"second is {second.dtype}, first is {first.dtype}"
    return refusal_by(backend, "first", first)


class _ConcatPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        return concatenated(first, second, False, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        g = nhwc(g)
        return *taken_apart([g], g, False, ctx.backend), None


def concatenated(first: Tensor, second: Tensor, relu: bool, backend: str) -> Tensor:
    """concat(first, second) or, with `relu`, its ReLU, in NHWC memory, as both maps are."""
    if backend == "triton":
        return _concatenated(first, second, relu)
    # By PyTorch's own kernels: the extension has none for it.
    together = _reference(first, second)
    return together.relu_() if relu else together


def taken_apart(gradients: list[Tensor], y: Tensor, relu: bool, backend: str) -> Sequence[Tensor]:
    """The gradients of both maps in NHWC memory of their own, from those of the readers of y.

    y: what `concatenated` gave, or without `relu` any map like it.
    """
    if backend == "triton":
        return _taken_apart(gradients, y, relu)
    total = gradients[0]
    if relu or len(gradients) > 1:
        total = gradient_sum(gradients, y, relu, backend)
    pairs = total.movedim(1, -1).unflatten(-1, (2, -1))
    return pairs.movedim(-2, 0).contiguous().movedim(-1, 2).unbind()


@custom_op("lgcnet_fast::concat_pair", mutates_args=())
def _concatenated(first: Tensor, second: Tensor, relu: bool) -> Tensor:
    from lgcnet_fast.kernels.concat_pair import concat_pair_forward

    return concat_pair_forward(first, second, relu)


@_concatenated.register_fake
def _(first: Tensor, second: Tensor, relu: bool) -> Tensor:
    batch, channels, height, width = first.shape
    return empty_nhwc(first, (batch, 2 * channels, height, width))


@custom_op("lgcnet_fast::concat_pair_backward", mutates_args=())
def _taken_apart(gradients: list[Tensor], y: Tensor, relu: bool) -> list[Tensor]:
    from lgcnet_fast.kernels.concat_pair import concat_pair_backward

    return concat_pair_backward(gradients, y, relu)


@_taken_apart.register_fake
def _(gradients: list[Tensor], y: Tensor, relu: bool) -> list[Tensor]:
    batch, channels, height, width = y.shape
    return [empty_nhwc(y, (batch, channels // 2, height, width)) for _ in range(2)]


def _reference(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first, second), dim=1)


def _run(backend: str, first: Tensor, second: Tensor) -> Tensor:
    result: Tensor = _ConcatPair.apply(nhwc(first), nhwc(second), backend)
    return result


_operation = Operation(
    "concat_pair",
    _reference,
    **{
        backend: Implementation(partial(_run, backend), partial(refuse_pair, backend))
        for backend in ("triton", "cuda")
    },
    tuned_as="separable_branches",
)

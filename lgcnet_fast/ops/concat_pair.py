"""The concatenation of two maps, whose gradient is taken apart in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.maps import dtype_refusal, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape


def concat_pair(first: Tensor, second: Tensor) -> Tensor:
    """(N, 2C, H, W) of two maps (N, C, H, W).

    Autograd hands out the gradients of both as parts of one map, which every kernel that reads them
    has to copy before; the fused form gives each in NHWC memory of its own.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("first", first)
    check_map("second", second)
    check_shape("second", second, tuple(first.shape))
    check_beside("second", second, "first", first)
    result: Tensor = _operation(first, second)
    return result


class _ConcatPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return _reference(first, second)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        pairs = g.movedim(1, -1).unflatten(-1, (2, -1))
        return pairs.movedim(-2, 0).contiguous().movedim(-1, 2).unbind()


def _reference(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first, second), dim=1)


def _run(first: Tensor, second: Tensor) -> Tensor:
    result: Tensor = _ConcatPair.apply(nhwc(first), nhwc(second))
    return result


def _refuse(first: Tensor, second: Tensor) -> str | None:
    if first.dtype != second.dtype:
        return f"second is {second.dtype}, first is {first.dtype}"
    return dtype_refusal("first", first)


_form = Implementation(_run, _refuse)
_operation = Operation(
    "concat_pair", _reference, triton=_form, cuda=_form, tuned_as="separable_branches"
)

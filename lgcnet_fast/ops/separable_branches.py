"""Depthwise-separable branches of maps: the bodies of `sep3` and `dil3_*` of several edges."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Operation
from lgcnet_fast.ops.depthwise_separable import relu_depthwise_separable
from lgcnet_fast.ops.fused_depthwise_branches import FORMS
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape
from lgcnet_fast.ops.products import Entry

MAX_DILATIONS = 7


def separable_branches(
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int = 1,
    stacks: Sequence[int] | None = None,
    to_sum: Sequence[bool] | None = None,
) -> list[list[Entry]]:
    """`pointwise[b] * (depthwise[b] * relu(x))` of every branch, without batch norms.

    x: (N, C, H, W). depthwise: weights (C, 1, 3, 3), pointwise: weights (C_out, C, 1, 1), one a
    branch; padding is the dilation. dilations: 1 to 7 of them, each 1 to 255; where there are more
    branches they repeat, so that edge after edge can list its branches. stacks: numbers of
    neighbouring branches of an edge that go on together, all of the edge's by default. to_sum:
    whether nobody but `mixed_norm_sum` takes the maps, for each of the dilations, the same for the
    branches of a stack; by default others do.

    Returns the maps of each stack in a list: one map (N, C_out, ceil(H / stride), ceil(W / stride))
    a branch, or a single stack (B, N, C_out, ...) of them, as suits the backend. `mixed_norm_sum`
    takes either; what goes `to_sum` may be `Products` that are not multiplied out. Under autocast x
    and the weights enter the products in its dtype, and the maps come out in it.

    Differentiable in x and the weights. The fused form reads x once for all branches; for the
    backward pass it keeps x and copies of the weights, and computes the depthwise maps anew; where
    it hands on products it keeps the depthwise maps too. The reference keeps three maps a branch:
    the ReLU of x, the depthwise map and its result.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    if stacks is None:
        stacks = [len(dilations)] * (len(depthwise) // max(1, len(dilations)))
    check_branches([x], depthwise, pointwise, dilations, stride, stacks)
    to_sum = [False] * len(dilations) if to_sum is None else to_sum
    _check_to_sum(to_sum, dilations, stacks)
    arguments = (x, tuple(depthwise), tuple(pointwise), tuple(dilations), stride, tuple(stacks))
    result: list[list[Entry]] = _operation(*arguments, tuple(to_sum))
    return result


def _reference(
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
    to_sum: Sequence[bool],
) -> list[list[Tensor]]:
    branches = iter(enumerate(zip(depthwise, pointwise, strict=True)))
    return [
        [
            relu_depthwise_separable(x, *weights, stride, dilations[branch % len(dilations)])
            for branch, weights in islice(branches, count)
        ]
        for count in stacks
    ]


def check_branches(
    xs: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
) -> None:
    """xs: maps that share out the branches. Raises `OperandError`."""
    if not xs:
        raise OperandError("x: no maps")
    for index, x in enumerate(xs):
        name = "x" if len(xs) == 1 else f"x[{index}]"
        check_map(name, x)
        check_shape(name, x, tuple(xs[0].shape))
        check_beside(name, x, "the first", xs[0])
        if x.dtype != xs[0].dtype:
            raise OperandError(f"{name}: {x.dtype}, the first is {xs[0].dtype}")
    if stride not in (1, 2):
        raise OperandError(f"stride: {stride}, need 1 or 2")
    if not 1 <= len(dilations) <= MAX_DILATIONS:
        raise OperandError(f"dilations: {len(dilations)} of them, need 1 to {MAX_DILATIONS}")
    if any(not 1 <= dilation <= 255 for dilation in dilations):
        raise OperandError(f"dilations: {tuple(dilations)}, each must be 1 to 255")
    branches = len(depthwise)
    if branches == 0 or branches % (len(xs) * len(dilations)):
        raise OperandError(
            f"depthwise: {branches} weights for {len(xs)} maps and {len(dilations)} dilations"
        )
    if len(pointwise) != branches:
        raise OperandError(f"pointwise: {len(pointwise)} weights for {branches} branches")
    edges = [len(dilations)] * (branches // len(dilations))
    if min(stacks) < 1 or not set(accumulate(stacks)) >= set(accumulate(edges)):
        raise OperandError(f"stacks: {stacks} do not divide edges of {len(dilations)} branches")
    if sum(stacks) != branches:
        raise OperandError(f"stacks: {stacks} do not divide {branches} branches")
    x = xs[0]
    channels, c_out = x.shape[1], pointwise[0].shape[0]
    for name, weights, shape in (
        ("depthwise", depthwise, (channels, 1, 3, 3)),
        ("pointwise", pointwise, (c_out, channels, 1, 1)),
    ):
        for index, weight in enumerate(weights):
            check_shape(f"{name}[{index}]", weight, shape)
            check_beside(f"{name}[{index}]", weight, "x", x)
            if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise OperandError(f"{name}[{index}]: {weight.dtype}, x is {x.dtype}")


def _check_to_sum(to_sum: Sequence[bool], dilations: Sequence[int], stacks: Sequence[int]) -> None:
    """Raises `OperandError`."""
    if len(to_sum) != len(dilations):
        raise OperandError(f"to_sum: {len(to_sum)} for {len(dilations)} dilations")
    for first, count in zip(accumulate(stacks, initial=0), stacks, strict=False):
        branch = first % len(dilations)
        if len(set(to_sum[branch : branch + count])) > 1:
            raise OperandError(f"to_sum: {to_sum} divides a stack of {count} branches")


_operation = Operation("separable_branches", _reference, **FORMS)

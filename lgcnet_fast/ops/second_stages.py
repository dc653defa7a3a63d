"""The second stages of `sep3` of several edges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Operation
from lgcnet_fast.ops.depthwise_separable import relu_depthwise_separable
from lgcnet_fast.ops.fused_second_stages import FORMS
from lgcnet_fast.ops.maps import unstacked
from lgcnet_fast.ops.products import Entry
from lgcnet_fast.ops.separable_branches import check_branches


def second_stages(
    ys: Sequence[Sequence[Tensor]],
    norms: Sequence[nn.Module],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    to_sum: bool = False,
) -> list[list[Entry]]:
    """`pointwise[e] * (depthwise[e] * relu(norms[e](y)))` of every edge e.

    ys: for each edge its raw first stage, as `separable_branches` gives it, all of one shape.
    norms: `nn.BatchNorm2d`, which behave as when called. depthwise: (C, 1, 3, 3), pointwise:
    (C_out, C, 1, 1). to_sum: whether nobody but `mixed_norm_sum` takes the results. Returns the raw
    maps of the second stages in the same form; what goes `to_sum` may be `Products` that are not
    multiplied out.

    Differentiable in ys and the weights. The fused form takes norms as `mixed_norm_sum` does. It
    serves all edges together, or with `cuda` side by side where a CUDA graph is captured, and it
    keeps ys, copies of the weights and 3 C numbers an edge for the backward pass, in which it
    normalises again.

    Raises `OperandError` naming the argument at fault, `ValueError` for training statistics of a
    single value a channel, `BackendError` where the chosen backend cannot serve.
    """
    maps = [y for entry in ys for y in unstacked(entry)]
    if not len(maps) == len(ys) == len(norms):
        raise OperandError(f"ys: {len(maps)} maps, {len(norms)} norms for {len(ys)} edges")
    check_branches(maps, depthwise, pointwise, (1,), 1, (1,) * len(depthwise))
    entries = tuple(y for entry in ys for y in entry)
    result: list[list[Entry]] = _operation(
        entries, tuple(norms), tuple(depthwise), tuple(pointwise), to_sum
    )
    return result


def _reference(
    ys: Sequence[Tensor],
    norms: Sequence[nn.Module],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    to_sum: bool,
) -> list[list[Tensor]]:
    normed = [norm(y) for y, norm in zip(unstacked(ys), norms, strict=True)]
    every = zip(normed, depthwise, pointwise, strict=True)
    return [[relu_depthwise_separable(*stage)] for stage in every]


_operation = Operation("second_stages", _reference, **FORMS, tuned_as="separable_branches")

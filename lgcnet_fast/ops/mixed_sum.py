"""Weighted sum of candidate outputs: LGCNet equation 3 at one node."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def mixed_sum(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """`sum_m weights[m] * outputs[m]`.

    outputs: M >= 1 maps (N, C, H, W) of one shape and dtype. weights: M scalars (shape ()), float32
    or the maps' dtype. Returns (N, C, H, W) in the maps' dtype; differentiable in both.
    """
    total = outputs[0] * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total += output * weight
    return total

"""Bilinear resizing with aligned corners in exact integers, shared by the resizing kernels.

Along one axis, output o of `size_out` lies at o * n / d between the inputs, with n = size_in - 1
and d = size_out - 1 (at 0 if the output has a single position). Position and support are decided
in integers, so forward and backward agree on every weight, and no rounding of the scale moves a
sample across an input. Sizes up to 32768 keep all products below 2^31.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import triton
import triton.language as tl

Size = tuple[int, int]
MAX_SIZE = 32768


@triton.jit
def lower_input(output, size_in, size_out):
    """The input at or before `output`."""
    return output * tl.where(size_out > 1, size_in - 1, 0) // tl.maximum(size_out - 1, 1)


@triton.jit
def beyond(output, input, size_in, size_out, ACC: tl.constexpr):
    """How far `output` lies beyond `input`, in distances between inputs.

    With the input before the output, this is the weight of the one behind. A product with the
    reciprocal of d, which is the same for all outputs.
    """
    steps = tl.maximum(size_out - 1, 1)
    position = output * tl.where(size_out > 1, size_in - 1, 0)
    return (position - input * steps).to(ACC) * (1 / steps.to(ACC))


@triton.jit
def first_output(lower, size_in, size_out):
    """The first output at or beyond input `lower`, within 0 .. size_out.

    The outputs between inputs i and i + 1 are thus first_output(i) .. first_output(i + 1) - 1.
    """
    stride = size_in - 1
    steps = size_out - 1
    first = (lower * steps + stride - 1) // tl.maximum(stride, 1)
    first = tl.where((stride == 0) | (steps == 0), size_out, first)
    return tl.where(lower <= 0, 0, tl.minimum(first, size_out))


@cache
def most_outputs_beside(size_in: int, size_out: int) -> int:
    """The most outputs that read one input along an axis, with a weight above 0."""
    if size_in == 1 or size_out == 1:
        return size_out
    stride, steps = size_in - 1, size_out - 1
    # Strictly between the neighbours of an input: from the first one to before the other.
    firsts = [max(0, (i - 1) * steps // stride + 1) for i in range(size_in)]
    ends = [min(size_out, -(-(i + 1) * steps // stride)) for i in range(size_in)]
    return max(end - first for first, end in zip(firsts, ends, strict=True))


def check_size(name: str, size: Sequence[int]) -> None:
    """Raises `ValueError` unless the argument `name` is a (height, width) that kernels serve."""
    if len(size) != 2 or not all(1 <= length <= MAX_SIZE for length in size):
        raise ValueError(f"{name}: {tuple(size)}, need (height, width) of 1 to {MAX_SIZE} each")

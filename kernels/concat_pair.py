"""The concatenation of two maps, or its ReLU, and the gradients of both, each in one launch:

    y = (x0, x1)                 or   y = max(0, (x0, x1))
    (dx0, dx1) = sum_k g_k       or   (dx0, dx1) = [y > 0] sum_k g_k

for the gradients g_k of the K readers of y. x0, x1 and their gradients are (N, C, H, W), all else
(N, 2 C, H, W), in channels_last memory. Least traffic, in maps of y's size: 2 forward; K + 1 going
backward, and y behind a ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, empty_map
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps
from lgcnet_fast.kernels.rows import vector_width

BLOCK = 1024
"""Elements of either half a program: one vector of 16-bit storage a thread, half and map."""
WARPS = 4
LARGEST_INDEX = 2**31 - 1


@triton.jit
def _vectors(count, per_pixel, INDEX: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """This program's offsets in a half, in the whole and there beyond the first half, and mask.

    count: the vectors of a half.
    """
    vector = tl.program_id(0).to(INDEX) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, VECTOR)[None, :]
    half = vector.to(tl.int64) * VECTOR + lane
    whole = (vector + vector // per_pixel * per_pixel).to(tl.int64) * VECTOR + lane
    return half, whole, whole + per_pixel * VECTOR, vector < count


@triton.jit
def _relu(x, ACC: tl.constexpr):
    """NaN stays, as in PyTorch."""
    return tl.where(x.to(ACC) <= 0, 0.0, x)


@kernel(do_not_specialize=["count", "per_pixel"])
def _concat_pair_kernel(
    x0_ptr, x1_ptr, y_ptr, count, per_pixel,
    RELU: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor()
    half, first, second, mask = _vectors(count, per_pixel, INDEX, GROUPS, VECTOR)
    x0 = tl.load(x0_ptr + half, mask=mask)
    x1 = tl.load(x1_ptr + half, mask=mask)
    if RELU:
        x0 = _relu(x0, ACC)
        x1 = _relu(x1, ACC)
    tl.store(y_ptr + first, x0, mask=mask)
    tl.store(y_ptr + second, x1, mask=mask)


@kernel(do_not_specialize=["count", "per_pixel"])
def _concat_pair_grad_kernel(
    g_ptrs, y_ptr, dx0_ptr, dx1_ptr, count, per_pixel,
    K: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor()
    half, first, second, mask = _vectors(count, per_pixel, INDEX, GROUPS, VECTOR)
    dx0 = tl.zeros((GROUPS, VECTOR), dtype=ACC)
    dx1 = tl.zeros((GROUPS, VECTOR), dtype=ACC)
    for k in tl.static_range(K):
        dx0 += tl.load(g_ptrs[k] + first, mask=mask, other=0.0).to(ACC)
        dx1 += tl.load(g_ptrs[k] + second, mask=mask, other=0.0).to(ACC)
    if RELU:
        # NaN lets the gradient pass, as in PyTorch.
        dx0 = tl.where(tl.load(y_ptr + first, mask=mask, other=0.0).to(ACC) <= 0, 0.0, dx0)
        dx1 = tl.where(tl.load(y_ptr + second, mask=mask, other=0.0).to(ACC) <= 0, 0.0, dx1)
    tl.store(dx0_ptr + half, dx0, mask=mask)
    tl.store(dx1_ptr + half, dx1, mask=mask)


def concat_pair_forward(first: Tensor, second: Tensor, relu: bool) -> Tensor:
    """concat(first, second) along the channels, or its ReLU: (N, 2 C, H, W), channels_last.

    first, second: (N, C, H, W), channels_last. Raises `ValueError` naming the argument at fault.
    """
    check_maps("maps", [first, second], first)
    batch, channels, height, width = first.shape
    y = empty_map((batch, 2 * channels, height, width), first)
    grid, arguments, constants = _launch(first)
    _concat_pair_kernel[grid](first, second, y, *arguments, RELU=relu, **constants)
    return y


def concat_pair_backward(gradients: Sequence[Tensor], y: Tensor, relu: bool) -> list[Tensor]:
    """The gradients of both maps, each (N, C, H, W), channels_last, from those of y's readers.

    y: what `concat_pair_forward` gave, (N, 2 C, H, W), channels_last, as is every gradient. Added
    in the accumulator's dtype and rounded once. Raises `ValueError` naming the argument at fault.
    """
    check_maps("y", [y], y)
    check_maps("gradients", gradients, y)
    batch, channels, height, width = y.shape
    if channels % 2:
        raise ValueError(f"y: shape {tuple(y.shape)}, need an even number of channels")
    halves = [empty_map((batch, channels // 2, height, width), y) for _ in range(2)]
    grid, arguments, constants = _launch(halves[0])
    _concat_pair_grad_kernel[grid](
        tuple(gradients), y, *halves, *arguments, K=len(gradients), RELU=relu, **constants
    )
    return halves


def _launch(half: Tensor) -> tuple[tuple[int], tuple[int, int], dict[str, Any]]:
    """Grid, numbers and compile-time arguments of either kernel."""
    channels = half.shape[1]
    vector = vector_width(half.dtype, channels)
    count, groups = half.numel() // vector, BLOCK // vector
    # Vectors of the whole are counted too.
    wide = 2 * (count + groups) > LARGEST_INDEX
    constants = {
        "ACC": accumulator(half.dtype),
        "INDEX": tl.int64 if wide else tl.int32,
        "GROUPS": groups,
        "VECTOR": vector,
        "num_warps": WARPS,
    }
    return (triton.cdiv(count, groups),), (count, channels // vector), constants

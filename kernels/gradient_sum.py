"""The gradient of a map, or of its ReLU, that several operations read, in one launch:

    dx = sum_k g_k,   or   dx = [x > 0] sum_k g_k

All maps are (N, C, H, W) in channels_last memory. Least traffic of K readers in maps: K + 1, and x
behind a ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, empty_map
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import check_maps

BLOCK = 2048
"""Elements of a program: 32 bytes of 16-bit storage a thread and map."""
WARPS = 4


# `size` is specialised: vectors are loaded only where it is known to be a multiple of them.
@kernel
def _gradient_sum_kernel(
    g_ptrs, x_ptr, dx_ptr, size,
    K: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor()
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    total = tl.zeros((BLOCK,), dtype=ACC)
    for k in tl.static_range(K):
        total += tl.load(g_ptrs[k] + offset, mask=mask, other=0.0).to(ACC)
    if RELU:
        # NaN lets the gradient pass, as in PyTorch.
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(ACC)
        total = tl.where(x <= 0, 0.0, total)
    tl.store(dx_ptr + offset, total, mask=mask)


def gradient_sum(
    gradients: Sequence[Tensor], x: Tensor, relu: bool, out: Tensor | None = None
) -> Tensor:
    """The gradient of x, like it: (N, C, H, W), channels_last, as is every gradient.

    relu: the gradients are those of relu(x); out: where it goes, maybe in the place of one of
    them. Added in the accumulator's dtype and rounded once. Raises `ValueError` naming the argument
    at fault.
    """
    check_maps("x", [x], x)
    check_maps("gradients", gradients, x)
    if out is not None:
        check_maps("out", [out], x)
    dx = empty_map(tuple(x.shape), x) if out is None else out
    _gradient_sum_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        tuple(gradients), x, dx, x.numel(),
        K=len(gradients), RELU=relu, ACC=accumulator(x.dtype), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return dx

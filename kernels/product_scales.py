"""What a node of products takes beside its matrices: scales of raw maps, and one shift.

Of K products, each of which is shifted by b_k, and R raw maps with their weights z_r, means and
inverse deviations,

    a_r = z_r r_r,   b = sum_k b_k + sum_r a_r mean_r

per output channel. All is a few KB; what counts is that it is one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import check_dense

BLOCK = 32
"""Channels of a program."""
WARPS = 1


@triton.jit(do_not_specialize=["K", "R"])
def _scales_kernel(
    shift_ptr, z_ptr, statistics_ptr, scale_ptr, total_ptr, K, R, C, BLOCK: tl.constexpr
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    total = tl.zeros((BLOCK,), dtype=total_ptr.dtype.element_ty)
    for k in range(K):
        total += tl.load(shift_ptr + k * C + channel, mask=inside, other=0.0)
    for r in range(R):
        entry = r * C + channel
        mean = tl.load(statistics_ptr + entry, mask=inside, other=0.0)
        inverse = tl.load(statistics_ptr + 2 * R * C + entry, mask=inside, other=0.0)
        scale = tl.load(z_ptr + r).to(total_ptr.dtype.element_ty) * inverse
        tl.store(scale_ptr + entry, scale, mask=inside)
        total += scale * mean
    tl.store(total_ptr + channel, total, mask=inside)


def product_scales(shift: Tensor, z: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """The scales (R, C) and the shift (C,), of the dtype of the arguments but z.

    shift: (K, C); z: (R,), of any float dtype; statistics: (3, R, C), mean, variance and inverse
    deviation; all contiguous, R may be 0. Raises `ValueError` naming the argument at fault.
    """
    products, channels = shift.shape
    raw = len(z)
    check_dense("shift", shift, (products, channels), shift)
    check_dense("z", z, (raw,), shift)
    check_dense("statistics", statistics, (3, raw, channels), shift)
    if statistics.dtype != shift.dtype:
        raise ValueError(f"statistics: dtype {statistics.dtype}, shift has {shift.dtype}")
    scales, total = shift.new_empty(raw, channels), shift.new_empty(channels)
    _scales_kernel[(triton.cdiv(channels, BLOCK),)](
        shift, z, statistics, scales, total, products, raw, channels, BLOCK=BLOCK, num_warps=WARPS
    )
    return scales, total

"""Global pooling of an inference network: means of the ReLU over a k x k grid, then a 1x1 product.

    m[b, c] = mean over the pixels of bin b of max(x[., c], 0),    y[b, n] = bias[n] + m[b] W[., n]

Bin (i, j) covers the rows floor(i H / k) .. ceil((i + 1) H / k) - 1 and the columns likewise; bins
may share pixels. Two stages, without atomics: programs sum strips of a bin's rows, then one
program a bin adds the strips in a fixed order, divides and multiplies.

Least traffic: the map once; everything else is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.infer_terms import channels_below, rectified
from lgcnet_fast.kernels.infer_tile import MapView
from lgcnet_fast.kernels.launches import kernel

STRIPS = 128
"""Whose sums the second stage loads at once: there, and in the first, time is spent on waiting."""


@dataclass(frozen=True)
class PoolConfig:
    """Pixels that a program adds at once, and its warps."""

    block: int = 128
    warps: int = 8


def run_pool_sums(
    source: MapView,
    batch: int,
    bins: int,
    partial: Tensor,
    first_channel: int,
    config: PoolConfig | None = None,
) -> None:
    """Writes channels `first_channel` .. of partial (N, bins^2, strips, channels), float32."""
    config = config or PoolConfig()
    strips, channels = partial.shape[2:]
    _sums_kernel[(bins * bins, strips, batch)](
        source.data, partial, source.height, source.width, bins, strips, channels, first_channel,
        C=source.channels, BLOCK_C=triton.next_power_of_2(source.channels), PITCH=source.pitch,
        BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip


def run_pool_product(
    partial: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, out: MapView
) -> None:
    """weight: (channels, c_out) float32; size: of the pooled map; out: (N, bins, bins, c_out)."""
    batch, _, strips, channels = partial.shape
    _product_kernel[(out.height * out.width, batch)](
        partial, weight, bias, out.data, *size, out.height, strips,
        C=channels, N=out.channels, BLOCK_N=triton.next_power_of_2(out.channels), PITCH=out.pitch,
        BLOCK_C=min(64, triton.next_power_of_2(channels)), STRIPS=STRIPS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _bin(index, bins, length):
    """First position of a bin along an axis and the first behind it."""
    return index * length // bins, ((index + 1) * length + bins - 1) // bins


@kernel(
    programmatic=False,
    do_not_specialize=["height", "width", "bins", "strips", "channels", "first_channel"],
)
def _sums_kernel(
    x_ptr, partial_ptr, height, width, bins, strips, channels, first_channel,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (bins^2, strips, N): the sums over the rows that a strip takes in turn."""
    image = tl.program_id(2)
    top, bottom = _bin(tl.program_id(0) // bins, bins, height)
    left, right = _bin(tl.program_id(0) % bins, bins, width)
    c = tl.arange(0, BLOCK_C)
    exists = channels_below(c, C, BLOCK_C)
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for row in range(top + tl.program_id(1), bottom, strips):
        row_ptr = x_ptr + (image * height + row).to(tl.int64) * width * PITCH
        for start in range(left, right, BLOCK):
            column = (start + tl.arange(0, BLOCK))[:, None]
            mask = (column < right) & exists
            x = tl.load(row_ptr + column * PITCH + c[None, :], mask=mask, other=0.0)
            total += rectified(x, True).to(tl.float32)
    strip = (image * (bins * bins) + tl.program_id(0)) * strips + tl.program_id(1)
    target = partial_ptr + strip * channels + first_channel + c
    tl.store(target, tl.sum(total, axis=0), mask=c < C)


@kernel(programmatic=False, do_not_specialize=["height", "width", "bins", "strips"])
def _product_kernel(
    partial_ptr, w_ptr, bias_ptr, y_ptr, height, width, bins, strips,
    C: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, PITCH: tl.constexpr,
    BLOCK_C: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Grid (bins^2, N); STRIPS: that are loaded at once."""
    image = tl.program_id(1)
    top, bottom = _bin(tl.program_id(0) // bins, bins, height)
    left, right = _bin(tl.program_id(0) % bins, bins, width)
    pixels = ((bottom - top) * (right - left)).to(tl.float32)
    n = tl.arange(0, BLOCK_N)
    y = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    one_bin = image * (bins * bins) + tl.program_id(0)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mean = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, strips, STRIPS):
            strip = (start + tl.arange(0, STRIPS))[:, None]
            offset = (one_bin * strips + strip) * C + c[None, :]
            mask = (strip < strips) & (c < C)[None, :]
            mean += tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0), axis=0)
        mean /= pixels
        weight = tl.load(
            w_ptr + c[:, None] * N + n[None, :], mask=(c < C)[:, None] & (n < N)[None, :], other=0.0
        )
        y += tl.sum(mean[:, None] * weight, axis=0)
    tl.store(y_ptr + one_bin * PITCH + n, y.to(y_ptr.dtype.element_ty), mask=n < N)

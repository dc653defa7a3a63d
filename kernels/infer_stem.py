"""The first convolution of a network, straight from the pixels of the image.

    y[i, j, n] = r(b[n] + sum_{u, v, c} w[u, v, c, n] (x[s i + u, s j + v, c] - mean[c])),
    u, v in {-1, 0, 1}, c: red, green, blue

with zero padding after the subtraction, as networks see normalised images; the deviations are in
the weights. x: uint8 or float32 in 0..255. Least traffic: 3 bytes a pixel of a uint8 image, the
output once; 54 N operations an output pixel, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.infer_terms import channels_below, rectified
from lgcnet_fast.kernels.infer_tile import MapView
from lgcnet_fast.kernels.launches import kernel


@dataclass(frozen=True)
class StemConfig:
    """Pixels in a row that a program computes."""

    block: int = 128
    warps: int = 4


def run_stem(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: tuple[float, float, float],
    out: MapView,
    stride: int,
    relu: bool,
    config: StemConfig | None = None,
) -> None:
    """image: (N, H, W, 3) contiguous; weight: (27, c_out) float32; writes (N, H / s, W / s)."""
    batch, height, width, _ = image.shape
    config = config or StemConfig()
    grid = (triton.cdiv(out.width, config.block), out.height, batch)
    _stem_kernel[grid](
        image, weight, bias, out.data, *mean, height, width, out.height, out.width,
        N=out.channels, BLOCK_N=triton.next_power_of_2(out.channels), PITCH=out.pitch,
        STRIDE=stride, RELU=relu, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip


@kernel(programmatic=False, do_not_specialize=["height", "width", "out_height", "out_width"])
def _stem_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, red, green, blue, height, width, out_height, out_width,
    N: tl.constexpr, BLOCK_N: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr,
    RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of an output row, output rows, N)."""
    image = tl.program_id(2)
    row = tl.program_id(1)
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    n = tl.arange(0, BLOCK_N)
    exists = channels_below(n, N, BLOCK_N)
    mean = (red, green, blue)
    bias = tl.load(bias_ptr + n[None, :], mask=exists, other=0.0)
    total = tl.zeros((BLOCK, BLOCK_N), tl.float32) + bias
    for u in tl.static_range(3):
        in_row = STRIDE * row + u - 1
        row_ptr = x_ptr + (image * height + in_row).to(tl.int64) * (3 * width)
        for v in tl.static_range(3):
            in_column = STRIDE * column + v - 1
            valid = (in_column >= 0) & (in_column < width) & (in_row >= 0) & (in_row < height)
            for c in tl.static_range(3):
                x = tl.load(row_ptr + (in_column * 3 + c), mask=valid, other=0).to(tl.float32)
                x = tl.where(valid, x - mean[c], 0.0)
                w_row_ptr = w_ptr + ((3 * u + v) * 3 + c) * N
                weight = tl.load(w_row_ptr + n[None, :], mask=exists, other=0.0)
                total += x * weight
    y = rectified(total, RELU)
    pixel = (image * out_height + row).to(tl.int64) * out_width + column
    mask = (column < out_width) & exists
    tl.store(y_ptr + pixel * PITCH + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)

"""Concatenation, or sum, of maps that are each resized bilinearly (aligned corners) or copied.

With lower neighbours (i, j) and fractions (f, g) of an output along the two axes:

    y = (1 - f) ((1 - g) x[i, j] + g x[i, j + 1]) + f ((1 - g) x[i + 1, j] + g x[i + 1, j + 1])

Least traffic: each map once, the output once; the four reads of an output meet in the caches.
Some 10 operations an output element. The gradients are in concat_upsample_backward.py.

All maps are dense NHWC: logical (N, C, H, W) in channels_last memory, of one storage dtype;
arithmetic is in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import Size, check_size, fraction, lower_input
from lgcnet_fast.kernels.common import accumulator, check_like, check_map
from lgcnet_fast.kernels.rows import (
    MAX_MAPS,
    StripConfig,
    checked_out,
    four,
    four_sizes,
    row_pointer,
    row_vectors,
    vector_width,
)

FORWARD = StripConfig(block=1024, rows=2, warps=4)
"""One vector of 16 bytes a thread and row."""


def concat_upsample_forward(
    maps: Sequence[Tensor],
    size: Size,
    out: Tensor | None = None,
    config: StripConfig = FORWARD,
) -> Tensor:
    """One to four maps (N, C_i, h_i, w_i), each resized to `size`: (N, sum C_i, *size), NHWC.

    Raises `ValueError`.
    """
    _check_maps(maps, size)
    channels = [x.shape[1] for x in maps]
    out = checked_out("out", out, (maps[0].shape[0], sum(channels), *size), maps[0])
    _launch_forward(maps, out.split(channels, dim=1), out.shape[1], False, config)
    return out


def sum_upsample_forward(
    maps: Sequence[Tensor],
    size: Size,
    out: Tensor | None = None,
    config: StripConfig = FORWARD,
) -> Tensor:
    """As `concat_upsample_forward`, but maps (N, C, h_i, w_i) are added: (N, C, *size), NHWC."""
    _check_maps(maps, size)
    for index, x in enumerate(maps):
        check_like(f"maps[{index}]", x, (*maps[0].shape[:2], *x.shape[2:]), maps[0])
    out = checked_out("out", out, (*maps[0].shape[:2], *size), maps[0])
    _launch_forward(maps, [out], out.shape[1], True, config)
    return out


def _check_maps(maps: Sequence[Tensor], size: Size) -> None:
    if not 1 <= len(maps) <= MAX_MAPS:
        raise ValueError(f"maps: {len(maps)} given, need 1 to {MAX_MAPS}")
    check_size("size", size)
    for index, x in enumerate(maps):
        name = f"maps[{index}]"
        check_map(name, x)
        check_size(f"size of {name}", x.shape[2:])
        check_like(name, x, (maps[0].shape[0], *x.shape[1:]), maps[0])
        if x.dtype != maps[0].dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, maps[0] has {maps[0].dtype}")


@triton.jit
def _resized_row(
    x_ptr, batch, row, pixel, channel, mask, h, w, C, height, width, ACC: tl.constexpr
):
    """(GROUPS, VECTOR): output row `row` of one map (N, h, w, C), at these pixels and channels."""
    if (h == height) & (w == width):
        source = row_pointer(x_ptr, batch, row, h, w * C) + pixel * C + channel
        value = tl.load(source, mask=mask).to(ACC)
    else:
        i, beyond_i = lower_input(row, h, height)
        j, beyond_j = lower_input(pixel, w, width)
        left = j * C + channel
        right = tl.minimum(j + 1, w - 1) * C + channel
        upper_ptr = row_pointer(x_ptr, batch, i, h, w * C)
        lower_ptr = row_pointer(x_ptr, batch, tl.minimum(i + 1, h - 1), h, w * C)
        upper_left = tl.load(upper_ptr + left, mask=mask).to(ACC)
        upper_right = tl.load(upper_ptr + right, mask=mask).to(ACC)
        lower_left = tl.load(lower_ptr + left, mask=mask).to(ACC)
        lower_right = tl.load(lower_ptr + right, mask=mask).to(ACC)
        g = fraction(beyond_j, width, ACC)
        upper = upper_left + g * (upper_right - upper_left)
        lower = lower_left + g * (lower_right - lower_left)
        value = upper + fraction(beyond_i, height, ACC) * (lower - upper)
    return value


@triton.jit(do_not_specialize=["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "height", "width"])
def _forward_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, height, width,
    vectors0, vectors1, vectors2, vectors3, all_vectors,
    MAPS: tl.constexpr, ADD: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of a row, blocks of ROWS rows, N x MAPS; N with ADD)."""
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    y_ptrs = (y0_ptr, y1_ptr, y2_ptr, y3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    vectors = (vectors0, vectors1, vectors2, vectors3)
    pitch = all_vectors * VECTOR
    first = tl.program_id(1) * ROWS
    if ADD:
        batch = tl.program_id(2)
        pixel, channel = row_vectors(tl.program_id(0), all_vectors, GROUPS, VECTOR)
        for r in tl.static_range(ROWS):
            row = first + r
            mask = (pixel < width) & (row < height)
            total = tl.zeros((GROUPS, VECTOR), ACC)
            for m in tl.static_range(MAPS):
                total += _resized_row(
                    x_ptrs[m], batch, row, pixel, channel, mask, heights[m], widths[m], pitch,
                    height, width, ACC,
                )  # fmt: skip
            target = (
                row_pointer(y0_ptr, batch, row, height, width * pitch) + pixel * pitch + channel
            )
            tl.store(target, total.to(y0_ptr.dtype.element_ty), mask=mask)
    else:
        batch = tl.program_id(2) // MAPS
        for m in tl.static_range(MAPS):
            if tl.program_id(2) % MAPS == m:
                pixel, channel = row_vectors(tl.program_id(0), vectors[m], GROUPS, VECTOR)
                for r in tl.static_range(ROWS):
                    row = first + r
                    mask = (pixel < width) & (row < height)
                    value = _resized_row(
                        x_ptrs[m], batch, row, pixel, channel, mask, heights[m], widths[m],
                        vectors[m] * VECTOR, height, width, ACC,
                    )  # fmt: skip
                    target = row_pointer(y_ptrs[m], batch, row, height, width * pitch)
                    target += pixel * pitch + channel
                    tl.store(target, value.to(y_ptrs[m].dtype.element_ty), mask=mask)


def _launch_forward(
    maps: Sequence[Tensor],
    outs: Sequence[Tensor],
    pitch: int,
    add: bool,
    config: StripConfig,
) -> None:
    """outs: the slice of the output for each map, or the one sum; its pixels lie `pitch` apart."""
    batch, _, height, width = outs[0].shape
    channels = [x.shape[1] for x in maps]
    vector = vector_width(outs[0].dtype, pitch, *channels)
    grid = (
        triton.cdiv(width * max(channels), config.block),
        triton.cdiv(height, config.rows),
        batch * len(outs),
    )
    _forward_kernel[grid](
        *four(maps), *four(outs), *four_sizes(maps), height, width,
        *four([c // vector for c in channels]), pitch // vector,
        MAPS=len(maps), ADD=add, GROUPS=config.block // vector, VECTOR=vector,
        ROWS=config.rows,
        ACC=accumulator(outs[0].dtype), num_warps=config.warps,
    )  # fmt: skip

"""Concatenation, or sum, of maps that are each resized bilinearly (aligned corners) or copied.

With lower neighbours (i, j) and fractions (f, g) of an output along the two axes:

    y = (1 - f) ((1 - g) x[i, j] + g x[i, j + 1]) + f ((1 - g) x[i + 1, j] + g x[i + 1, j + 1])

Least traffic: each map once, the output once; neighbours meet in the caches. Some 5 operations an
output element where the output has twice the input's rows. The gradients are in
concat_upsample_backward.py.

All maps are dense NHWC: logical (N, C, H, W) in channels_last memory, of one storage dtype;
arithmetic is in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import Size, beyond, check_size, first_output, lower_input
from lgcnet_fast.kernels.common import accumulator, check_like, check_map
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.rows import (
    MAX_MAPS,
    StripConfig,
    checked_out,
    copy_strip,
    four,
    four_sizes,
    map_of_program,
    row_pointer,
    row_vectors,
    vector_width,
)

FORWARD = StripConfig(block=1024, rows=4, warps=4)
"""One vector of 16-bit storage a thread and row. `rows`: of a map to concatenate, of a sum."""


def concat_upsample_forward(
    maps: Sequence[Tensor],
    size: Size,
    out: Tensor | None = None,
    config: StripConfig = FORWARD,
) -> Tensor:
    """One to four maps (N, C_i, h_i, w_i), each resized to `size`: (N, sum C_i, *size), NHWC.

    Raises `ValueError`.
    """
    check_maps(maps, size)
    channels = sum(x.shape[1] for x in maps)
    out = checked_out("out", out, (maps[0].shape[0], channels, *size), maps[0])
    _launch_concat(maps, out, config)
    return out


def sum_upsample_forward(
    maps: Sequence[Tensor],
    size: Size,
    out: Tensor | None = None,
    config: StripConfig = FORWARD,
) -> Tensor:
    """As `concat_upsample_forward`, but maps (N, C, h_i, w_i) are added: (N, C, *size), NHWC."""
    check_maps(maps, size)
    for index, x in enumerate(maps):
        check_like(f"maps[{index}]", x, (*maps[0].shape[:2], *x.shape[2:]), maps[0])
    out = checked_out("out", out, (*maps[0].shape[:2], *size), maps[0])
    _launch_sum(maps, out, config)
    return out


def check_maps(maps: Sequence[Tensor], size: Size) -> None:
    """Raises `ValueError` unless these are maps that can be resized to `size` together."""
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
def _columns(pixel, w, C, width, ACC: tl.constexpr):
    """Offsets of the inputs left and right of output column `pixel`, weight of the right one."""
    j = lower_input(pixel, w, width)
    return j * C, tl.minimum(j + 1, w - 1) * C, beyond(pixel, j, w, width, ACC)


@triton.jit
def _load_row(row_ptr, columns, channel, mask):
    """Both inputs of each output column of an input row; a right one of weight 0 is not loaded."""
    left, right, g = columns
    at_left = tl.load(row_ptr + (left + channel), mask=mask, other=0.0)
    at_right = tl.load(row_ptr + (right + channel), mask=mask & (g > 0), other=0.0)
    return at_left, at_right


@triton.jit
def _between(inputs, columns):
    """(GROUPS, VECTOR): an input row, as loaded, at the output columns of `_columns`."""
    _, _, g = columns
    return (1 - g) * inputs[0].to(g.dtype) + g * inputs[1].to(g.dtype)


@triton.jit
def _resize_strip(
    x_ptr, y_ptr, batch, first, pixel, channel, h, w, C, height, width, pitch,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The output rows between the input rows `first` .. `first` + ROWS of one map (N, h, w, C).

    Every input row is resized horizontally once, for the output rows above and below it. All are on
    their way before the first output is stored, as no load may pass a store.
    """
    mask = pixel < width
    columns = _columns(pixel, w, C, width, ACC)
    inputs = ()
    for r in tl.static_range(ROWS + 1):
        row_ptr = row_pointer(x_ptr, batch, tl.minimum(first + r, h - 1), h, w * C)
        inputs = inputs + (_load_row(row_ptr, columns, channel, mask),)
    upper = _between(inputs[0], columns)
    for r in tl.static_range(ROWS):
        i = first + r  # beyond the map it has no outputs
        lower = _between(inputs[r + 1], columns)
        for row in range(first_output(i, h, height), first_output(i + 1, h, height)):
            f = beyond(row, i, h, height, ACC)
            value = (1 - f) * upper + f * lower
            target = row_pointer(y_ptr, batch, row, height, width * pitch) + pixel * pitch + channel
            tl.store(target, value.to(y_ptr.dtype.element_ty), mask=mask)
        upper = lower


@kernel(do_not_specialize=["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "height", "width"])
def _concat_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, height, width,
    vectors0, vectors1, vectors2, vectors3, all_vectors,
    MAPS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Slices y of the output from maps x; grid (programs of an image's maps, N): blocks of an
    output row of strips of ROWS input rows of one map after the other."""
    wait_for_predecessor()
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    y_ptrs = (y0_ptr, y1_ptr, y2_ptr, y3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    vectors = (vectors0, vectors1, vectors2, vectors3)
    lengths = (width, width, width, width)
    x_ptr, y_ptr, h, w, per_pixel, block, first = map_of_program(
        x_ptrs, y_ptrs, heights, widths, vectors, lengths, MAPS, ROWS, GROUPS
    )
    pixel, channel = row_vectors(block, per_pixel, GROUPS, VECTOR)
    C, pitch = per_pixel * VECTOR, all_vectors * VECTOR
    batch = tl.program_id(1)
    if (h == height) & (w == width):
        copy_strip(x_ptr, C, y_ptr, pitch, batch, first, pixel, channel, height, width, ROWS)
    else:
        _resize_strip(
            x_ptr, y_ptr, batch, first, pixel, channel, h, w, C, height, width, pitch, ROWS, ACC
        )  # fmt: skip


@kernel(do_not_specialize=["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "height", "width"])
def _sum_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, y_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, height, width, vectors,
    MAPS: tl.constexpr, COPIED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sum y of maps x; grid (blocks of an output row, strips of ROWS output rows, N).

    COPIED: bits of the maps that have the output's size.
    """
    wait_for_predecessor()
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    C = vectors * VECTOR
    batch = tl.program_id(2)
    pixel, channel = row_vectors(tl.program_id(0), vectors, GROUPS, VECTOR)
    columns = ()
    for m in tl.static_range(MAPS):
        columns = columns + (_columns(pixel, widths[m], C, width, ACC),)
    totals = ()
    for r in tl.static_range(ROWS):
        row = tl.program_id(1) * ROWS + r
        mask = (pixel < width) & (row < height)
        total = tl.zeros((GROUPS, VECTOR), ACC)
        for m in tl.static_range(MAPS):
            if (COPIED >> m) & 1:
                source = row_pointer(x_ptrs[m], batch, row, height, width * C)
                total += tl.load(source + (pixel * C + channel), mask=mask, other=0.0).to(ACC)
            else:
                i = lower_input(row, heights[m], height)
                below = tl.minimum(i + 1, heights[m] - 1)
                f = beyond(row, i, heights[m], height, ACC)
                upper_ptr = row_pointer(x_ptrs[m], batch, i, heights[m], widths[m] * C)
                lower_ptr = row_pointer(x_ptrs[m], batch, below, heights[m], widths[m] * C)
                upper = _load_row(upper_ptr, columns[m], channel, mask)
                lower = _load_row(lower_ptr, columns[m], channel, mask)
                total += (1 - f) * _between(upper, columns[m]) + f * _between(lower, columns[m])
        totals = totals + (total,)
    # After all loads, as none may pass a store.
    for r in tl.static_range(ROWS):
        row = tl.program_id(1) * ROWS + r
        target = row_pointer(y_ptr, batch, row, height, width * C) + pixel * C + channel
        mask = (pixel < width) & (row < height)
        tl.store(target, totals[r].to(y_ptr.dtype.element_ty), mask=mask)


def _launch_concat(maps: Sequence[Tensor], out: Tensor, config: StripConfig) -> None:
    batch, pitch, height, width = out.shape
    slices = out.split([x.shape[1] for x in maps], dim=1)
    # Resized ones first, which take longest.
    order = sorted(range(len(maps)), key=lambda index: maps[index].shape[2:] == out.shape[2:])
    maps, slices = [maps[index] for index in order], [slices[index] for index in order]
    channels = [x.shape[1] for x in maps]
    vector = vector_width(out.dtype, *channels)
    programs = sum(
        triton.cdiv(width * x.shape[1], config.block) * triton.cdiv(x.shape[2], config.rows)
        for x in maps
    )
    _concat_kernel[programs, batch](
        *four(maps), *four(slices), *four_sizes(maps), height, width,
        *four([c // vector for c in channels]), pitch // vector,
        MAPS=len(maps), GROUPS=config.block // vector, VECTOR=vector, ROWS=config.rows,
        ACC=accumulator(out.dtype), num_warps=config.warps,
    )  # fmt: skip


def _launch_sum(maps: Sequence[Tensor], out: Tensor, config: StripConfig) -> None:
    batch, channels, height, width = out.shape
    vector = vector_width(out.dtype, channels)
    copied = sum((x.shape[2:] == out.shape[2:]) << index for index, x in enumerate(maps))
    grid = (triton.cdiv(width * channels, config.block), triton.cdiv(height, config.rows), batch)
    _sum_kernel[grid](
        *four(maps), out, *four_sizes(maps), height, width, channels // vector,
        MAPS=len(maps), COPIED=copied, GROUPS=config.block // vector, VECTOR=vector,
        ROWS=config.rows, ACC=accumulator(out.dtype), num_warps=config.warps,
    )  # fmt: skip

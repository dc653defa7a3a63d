"""Gradient of `concat_upsample` and `sum_upsample`: what each map gets from the output's gradient.

An input pixel sums the output's gradient over the outputs that read it, with the weights of the
forward pass (see concat_upsample.py). Nothing is scattered: the same inputs give the same bits.

Least traffic: the gradient once, each map's gradient once. A program walks down the output rows of
a strip of input rows; each row of the gradient is summed horizontally once and added to both input
rows around it, some 9 operations an element of the gradient. Small maps, of which every pixel is
read by many outputs, are summed along one axis after the other, by one program for a block of a
row; so are maps with more rows than the output, of which an output row may pass several.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import (
    Size,
    beyond,
    check_size,
    first_output,
    lower_input,
    most_outputs_beside,
)
from lgcnet_fast.kernels.common import accumulator, accumulator_dtype, check_map, empty_map
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

BACKWARD = StripConfig(block=1024, rows=5, warps=4)
"""`block` of 16-bit storage, otherwise as many bytes: one vector of 16 bytes a thread and tap.
`rows` + 1 intervals of output rows for `rows` rows; fewer rows where programs would be too few."""

_PROGRAMS = 528
"""Four on each of 132 multiprocessors."""
_LOADS, _LOADS_BESIDE_COPIES = 4, 8
"""Vectors of the gradient on their way to a thread, of the most output rows that fit: where all
maps are resized, and where programs that copy others run beside them."""

_LARGEST_DIRECT_SCALE = 4
"""Beyond it the gradient is summed along one axis after the other."""
_AXIS_LOADS = 16
"""Outputs of which a thread loads a vector at once there: 32 KB are on their way to a program."""


def concat_upsample_backward(
    grad: Tensor,
    channels: Sequence[int],
    sizes: Sequence[Size],
    out: Sequence[Tensor] | None = None,
    config: StripConfig = BACKWARD,
) -> list[Tensor]:
    """Gradients (N, channels[i], *sizes[i]), NHWC, of the maps, from grad (N, sum channels, H, W).

    Raises `ValueError`.
    """
    check_map("grad", grad)
    if sum(channels) != grad.shape[1]:
        raise ValueError(
            f"grad: {grad.shape[1]} channels, the maps' {list(channels)} sum up to {sum(channels)}"
        )
    return _backward(grad, grad.split(list(channels), dim=1), sizes, out, config)


def sum_upsample_backward(
    grad: Tensor,
    sizes: Sequence[Size],
    out: Sequence[Tensor] | None = None,
    config: StripConfig = BACKWARD,
) -> list[Tensor]:
    """Gradients (N, C, *sizes[i]), NHWC, of the added maps, from grad (N, C, H, W).

    The gradient of a map that had the output's size is `grad` itself: leave it out of `sizes`.
    """
    check_map("grad", grad)
    return _backward(grad, [grad] * len(sizes), sizes, out, config)


@triton.jit
def _column_taps(pixel, w, width, pitch, TAPS: tl.constexpr, ACC: tl.constexpr):
    """Offsets and weights of the up to TAPS output columns that read input column `pixel`."""
    stride = tl.where(width > 1, w - 1, 0)
    steps = tl.maximum(width - 1, 1)
    # The first output strictly right of the pixel's left neighbour.
    first = (tl.maximum(pixel, 1) - 1) * steps // tl.maximum(stride, 1) + 1
    first = tl.where((pixel > 0) & (stride > 0), first, 0)
    offsets = ()
    weights = ()
    for t in tl.static_range(TAPS):
        output = first + t
        weight = 1 - tl.abs(beyond(output, pixel, w, width, ACC))
        reads = (tl.abs(output * stride - pixel * steps) < steps) & (output < width)
        offsets = offsets + (output * pitch,)
        weights = weights + (tl.where(reads, weight, 0),)
    return offsets, weights


@triton.jit
def _rows_of_taps(row_ptr, rows, row_elements, channel, taps, mask, STEP: tl.constexpr):
    """STEP rows of the gradient from a pointer on, at every tap: (GROUPS, VECTOR) each.

    0 beyond the `rows` that there are. What a pixel does not read is not loaded for it, so that a
    NaN stays where it is.
    """
    offsets, weights = taps
    values = ()
    for step in tl.static_range(STEP):
        for t in tl.static_range(len(weights)):
            reads = mask & (step < rows) & (weights[t] > 0)
            value = tl.load(row_ptr + (offsets[t] + channel), mask=reads, other=0.0)
            values = values + (value,)
        row_ptr += row_elements
    return values


@triton.jit
def _gather_strip(
    grad_ptr, pitch, x_grad_ptr, batch, first, pixel, channel, h, w, C, height, width,
    ROWS: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows `first` .. `first` + ROWS - 1 of one map's gradient (N, h, w, C), h <= height.

    Every row of the output's gradient goes to the input rows above and below it. The next STEP
    rows are on their way while STEP are added.
    """
    mask = pixel < w
    taps = _column_taps(pixel, w, width, pitch, TAPS, ACC)
    _, weights = taps
    stride = tl.where(height > 1, h - 1, 0)
    steps = tl.maximum(height - 1, 1)
    # The first output strictly below the input row above the strip.
    start = (tl.maximum(first, 1) - 1) * steps // tl.maximum(stride, 1) + 1
    start = tl.where(first > 0, start, 0)
    end = first_output(first + ROWS, h, height)
    limit = tl.minimum(first + ROWS, h)
    row = lower_input(start, h, height)
    below = start * stride - row * steps
    row_ptr = row_pointer(grad_ptr, batch, start, height, width * pitch)
    x_row_ptr = row_pointer(x_grad_ptr, batch, row, h, w * C)
    upper = tl.zeros(channel.shape, ACC)
    lower = tl.zeros(channel.shape, ACC)
    values = _rows_of_taps(row_ptr, end - start, width * pitch, channel, taps, mask, STEP)
    for output in range(start, end, STEP):
        totals = ()
        for step in tl.static_range(STEP):
            total = tl.zeros(channel.shape, ACC)
            for t in tl.static_range(TAPS):
                total += weights[t] * values[step * TAPS + t].to(ACC)
            totals = totals + (total,)
        row_ptr += STEP * width * pitch
        rows = end - output - STEP
        values = _rows_of_taps(row_ptr, rows, width * pitch, channel, taps, mask, STEP)
        for step in tl.static_range(STEP):
            if below >= steps:
                inside = (row >= first) & (row < limit)
                target = x_row_ptr + (pixel * C + channel)
                tl.store(target, upper.to(x_grad_ptr.dtype.element_ty), mask=mask & inside)
                upper = lower
                lower = tl.zeros(channel.shape, ACC)
                x_row_ptr += w * C
                row += 1
                below -= steps
            f = below.to(ACC) * (1 / steps.to(ACC))
            upper += (1 - f) * totals[step]
            lower += f * totals[step]
            below += stride
    for last in tl.static_range(2):
        inside = (row + last >= first) & (row + last < limit)
        target = x_row_ptr + (pixel * C + channel)
        tl.store(target, upper.to(x_grad_ptr.dtype.element_ty), mask=mask & inside)
        upper = lower
        x_row_ptr += w * C


@kernel(do_not_specialize=["h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "height", "width"])
def _backward_kernel(
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, x0_ptr, x1_ptr, x2_ptr, x3_ptr,
    h0, w0, h1, w1, h2, w2, h3, w3, height, width,
    vectors0, vectors1, vectors2, vectors3, all_vectors,
    MAPS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    TAPS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients x of the maps from slices y of the output's; grid (programs of an image's maps, N):
    blocks of an input row of strips of ROWS input rows of one map after the other."""
    wait_for_predecessor()
    y_ptrs = (y0_ptr, y1_ptr, y2_ptr, y3_ptr)
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    heights = (h0, h1, h2, h3)
    widths = (w0, w1, w2, w3)
    vectors = (vectors0, vectors1, vectors2, vectors3)
    x_ptr, y_ptr, h, w, per_pixel, block, first = map_of_program(
        x_ptrs, y_ptrs, heights, widths, vectors, widths, MAPS, ROWS, GROUPS
    )
    pixel, channel = row_vectors(block, per_pixel, GROUPS, VECTOR)
    C, pitch = per_pixel * VECTOR, all_vectors * VECTOR
    batch = tl.program_id(1)
    if (h == height) & (w == width):
        copy_strip(y_ptr, pitch, x_ptr, C, batch, first, pixel, channel, height, width, ROWS)
    else:
        _gather_strip(
            y_ptr, pitch, x_ptr, batch, first, pixel, channel, h, w, C, height, width,
            ROWS, TAPS, STEP, ACC,
        )  # fmt: skip


@triton.jit
def _outputs(y, first, end, row_elements, mask, LOADS: tl.constexpr, ROWS: tl.constexpr):
    """LOADS tensors of the outputs `first`, `first` + ROWS .. below `end`, 0 beyond."""
    values = ()
    for load in tl.static_range(LOADS):
        output = first + load * ROWS
        row = y + output.to(tl.int64) * row_elements
        values = values + (tl.load(row, mask=mask & (output < end), other=0.0),)
    return values


@kernel(do_not_specialize=["size", "whole", "width"])
def _axis_kernel(
    y_ptr, x_ptr, size, whole, width, vectors, all_vectors,
    LOADS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x (N, size, width, C): what y (N, whole, width, pitch) gives along its second axis.

    Grid (N x blocks of a row, size). A thread has a vector of one of ROWS outputs that read the
    input, LOADS times at once; the threads add up theirs at the end.
    """
    wait_for_predecessor()
    blocks = tl.cdiv(width * vectors, GROUPS)
    batch, i = tl.program_id(0) // blocks, tl.program_id(1)
    pixel, channel = row_vectors(tl.program_id(0) % blocks, vectors, GROUPS, VECTOR)
    mask = pixel < width
    pitch = all_vectors * VECTOR
    offset = (pixel * pitch + channel)[None, :, :]
    # From the first output strictly beyond the input before.
    first = tl.where(i > 0, (tl.maximum(i, 1) - 1) * (whole - 1) // tl.maximum(size - 1, 1) + 1, 0)
    end = first_output(i + 1, size, whole)
    lane = tl.arange(0, ROWS)[:, None, None]
    total = tl.zeros((ROWS, GROUPS, VECTOR), ACC)
    y = row_pointer(y_ptr, batch, 0, whole, width * pitch) + offset
    values = _outputs(y, first + lane, end, width * pitch, mask[None, :, :], LOADS, ROWS)
    for start in range(first, end, LOADS * ROWS):
        for load in tl.static_range(LOADS):
            output = start + load * ROWS + lane
            weight = 1 - tl.abs(beyond(output, i, size, whole, ACC))
            total += weight * values[load].to(ACC)
        # On their way together: ptxas moves loads to their use, but not to another round.
        following = start + LOADS * ROWS + lane
        values = _outputs(y, following, end, width * pitch, mask[None, :, :], LOADS, ROWS)
    gathered = tl.sum(total, axis=0)
    target = row_pointer(x_ptr, batch, i, size, width * vectors * VECTOR)
    target += pixel * (vectors * VECTOR) + channel
    tl.store(target, gathered.to(x_ptr.dtype.element_ty), mask=mask)


def _backward(
    grad: Tensor,
    slices: Sequence[Tensor],
    sizes: Sequence[Size],
    out: Sequence[Tensor] | None,
    config: StripConfig,
) -> list[Tensor]:
    """The gradient of each map from its slice of `grad`."""
    pitch, *full = grad.shape[1:]
    check_size("size of grad", full)
    if not 1 <= len(sizes) == len(slices) <= MAX_MAPS:
        raise ValueError(f"sizes: {len(sizes)} for {len(slices)} maps, need 1 to {MAX_MAPS} alike")
    outs = []
    for index, (part, size) in enumerate(zip(slices, sizes, strict=True)):
        check_size(f"sizes[{index}]", size)
        shape = (*part.shape[:2], *size)
        outs.append(checked_out(f"out[{index}]", None if out is None else out[index], shape, grad))
    steep = [_is_steep(size, full) for size in sizes]
    gentle = [index for index, is_steep in enumerate(steep) if not is_steep]
    gentle.sort(key=lambda index: tuple(sizes[index]) == tuple(full))  # resized ones take longest
    if gentle:
        _launch_backward([slices[i] for i in gentle], pitch, [outs[i] for i in gentle], config)
    for part, x_grad, is_steep in zip(slices, outs, steep, strict=True):
        if is_steep:
            _backward_by_axes(part, pitch, x_grad, config)
    return outs


def _is_steep(size: Size, full: Sequence[int]) -> bool:
    scales = zip(size, full, strict=True)
    return size[0] > full[0] or any(whole > _LARGEST_DIRECT_SCALE * part for part, whole in scales)


def _backward_by_axes(part: Tensor, pitch: int, x_grad: Tensor, config: StripConfig) -> None:
    """Vertically, then horizontally: few pixels with many outputs each would leave a GPU idle.

    For the second pass every row is taken for an image of one column.
    """
    batch, channels, h, w = x_grad.shape
    width = part.shape[3]
    unrounded = part.new_empty((), dtype=accumulator_dtype(part.dtype))
    rows = empty_map((batch, channels, h, width), unrounded)
    _launch_axis(part, pitch, rows, config)
    columns = rows.movedim(1, -1).reshape(batch * h, width, 1, channels).movedim(-1, 1)
    x_columns = x_grad.movedim(1, -1).view(batch * h, w, 1, channels).movedim(-1, 1)
    _launch_axis(columns, channels, x_columns, config)


def _launch_axis(part: Tensor, pitch: int, x_grad: Tensor, config: StripConfig) -> None:
    """x_grad (N, C, size, width) from part (N, C, whole, width), whose pixels lie `pitch` apart."""
    batch, channels, size, width = x_grad.shape
    whole = part.shape[2]
    vector = vector_width(part.dtype, pitch, channels)
    vectors = width * channels // vector
    groups = min(max(1, config.block // vector), triton.next_power_of_2(vectors))
    rows = max(1, 32 * config.warps // groups)
    outputs = triton.next_power_of_2(most_outputs_beside(size, whole))
    loads = min(_AXIS_LOADS, triton.cdiv(outputs, rows))
    _axis_kernel[(batch * triton.cdiv(vectors, groups), size)](
        part, x_grad, size, whole, width, channels // vector, pitch // vector,
        LOADS=loads, ROWS=rows, GROUPS=groups, VECTOR=vector, ACC=accumulator(part.dtype),
        num_warps=config.warps,
    )  # fmt: skip


def _launch_backward(
    slices: Sequence[Tensor],
    pitch: int,
    outs: Sequence[Tensor],
    config: StripConfig,
) -> None:
    """slices: of the output's gradient, for each map; their pixels lie `pitch` apart."""
    batch, _, height, width = slices[0].shape
    channels = [x.shape[1] for x in outs]
    vector = vector_width(slices[0].dtype, pitch, *channels)
    resized = [x for x in outs if x.shape[2:] != (height, width)]
    taps = max((most_outputs_beside(x.shape[3], width) for x in resized), default=1)
    loads = _LOADS if len(resized) == len(outs) else _LOADS_BESIDE_COPIES
    groups = max(1, 2 * config.block // slices[0].dtype.itemsize // vector)
    blocks = [triton.cdiv(x.shape[3] * x.shape[1], groups * vector) for x in outs]
    rows = config.rows
    while rows > 1 and batch * _programs(blocks, outs, rows) < _PROGRAMS:
        rows = rows // 2
    _backward_kernel[(_programs(blocks, outs, rows), batch)](
        *four(slices), *four(outs), *four_sizes(outs), height, width,
        *four([c // vector for c in channels]), pitch // vector,
        MAPS=len(outs), GROUPS=groups, VECTOR=vector, ROWS=rows,
        TAPS=taps, STEP=max(1, loads // taps) if resized else 1, ACC=accumulator(slices[0].dtype),
        num_warps=config.warps,
    )  # fmt: skip


def _programs(blocks: Sequence[int], outs: Sequence[Tensor], rows: int) -> int:
    """Of an image: `blocks` of a row of each map, strips of `rows` rows."""
    return sum(b * triton.cdiv(x.shape[2], rows) for b, x in zip(blocks, outs, strict=True))

"""The kernels of the fused upsampling and cross entropy; upsample_loss.py has the maths."""

from __future__ import annotations

import triton
import triton.language as tl

from lgcnet_fast.kernels.bilinear import beyond, first_output
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.upsample_cells import (
    columns_of_cells,
    logits_along_row,
    logits_at,
    zeros_of_classes,
)

LOG2_E = tl.constexpr(1.4426950408889634)

_SHAPE = ["h", "w", "height", "width", "ignore_index"]


@triton.jit
def _exponentials(logits):
    """exp(z - max z) of every class, their sum, and max z."""
    top = logits[0]
    for c in tl.static_range(1, len(logits)):
        top = tl.maximum(top, logits[c])
    total = tl.zeros(top.shape, top.dtype)
    exponentials = ()
    for c in tl.static_range(len(logits)):
        # One multiply-add and the hardware's exponential.
        exponential = tl.exp2(logits[c] * LOG2_E - top * LOG2_E)
        exponentials = exponentials + (exponential,)
        total += exponential
    return exponentials, total, top


@triton.jit
def _cross_entropy(logits, total, top, label):
    """Loss of one pixel of every cell; NaN where the label is no class."""
    true = tl.full(top.shape, float("nan"), top.dtype)
    for c in tl.static_range(len(logits)):
        true = tl.where(label == c, logits[c], true)
    loss = top + tl.log(total) - true
    # Rounding may leave it below 0, which the order statistic takes for an ignored pixel.
    return tl.where(loss < 0, 0, loss)


@triton.jit
def _add_scaled(totals, values, factor):
    """totals[c] + factor values[c] for every class."""
    sums = ()
    for c in tl.static_range(len(totals)):
        sums = sums + (totals[c] + factor * values[c],)
    return sums


@triton.jit
def _softmax_gradient(exponentials, total, label, v):
    """v (softmax_c - [c = label]) for every class."""
    scale = v / total
    gradient = ()
    for c in tl.static_range(len(exponentials)):
        gradient = gradient + (scale * exponentials[c] - tl.where(label == c, v, 0),)
    return gradient


@kernel(do_not_specialize=_SHAPE)
def losses_kernel(
    rows_ptr, target_ptr, losses_ptr, h, w, height, width, ignore_index,
    CLASSES: tl.constexpr, PITCH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Loss of every pixel, -1 where it is ignored.

    Grid (blocks of cell columns, bands of ROWS cell rows, N).
    """
    wait_for_predecessor()
    cell = tl.program_id(0) * LANES + tl.arange(0, LANES)
    i = tl.program_id(1) * ROWS
    batch = tl.program_id(2)
    first, end = columns_of_cells(cell, w, width)
    for row in range(first_output(i, h, height), first_output(i + ROWS, h, height)):
        lefts, slopes = logits_along_row(
            rows_ptr, batch, row, cell, h, w, height, CLASSES, PITCH, ACC
        )
        start = (batch * height + row).to(tl.int64) * width
        for step in range(tl.max(end - first)):
            column = first + step
            inside = (column < end) & (cell < w)
            label = tl.load(target_ptr + start + column, mask=inside, other=0).to(tl.int32)
            logits = logits_at(lefts, slopes, beyond(column, cell, w, width, ACC))
            _, total, top = _exponentials(logits)
            loss = _cross_entropy(logits, total, top, label)
            loss = tl.where(label == ignore_index, -1, loss)
            tl.store(losses_ptr + start + column, loss.to(losses_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_classes(pointer, values, inside, CLASSES: tl.constexpr, pitch):
    for c in tl.static_range(CLASSES):
        tl.store(pointer + c * pitch, values[c], mask=inside)


@kernel(do_not_specialize=[*_SHAPE, "easy"])
def sums_kernel(
    rows_ptr, target_ptr, weight_ptr, losses_ptr, hardest_ptr, corners_ptr, sums_ptr,
    h, w, height, width, ignore_index, easy,
    CLASSES: tl.constexpr, PITCH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr, HARD_ONLY: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of v l and of v, a pair a program, and the corner sums of the gradient.

    Grid (blocks of cell columns, bands of ROWS cell rows, N). Corner sums are stored as
    (N, bands, ROWS + 1, 2, CLASSES, w): for the low-resolution rows around and inside the
    band, what the cells right of a column (0) and those left of it, under their own column (1),
    give to it.
    """
    wait_for_predecessor()
    cell = tl.program_id(0) * LANES + tl.arange(0, LANES)
    band = tl.program_id(1)
    batch = tl.program_id(2)
    first, end = columns_of_cells(cell, w, width)
    loss_sum = tl.zeros((LANES,), ACC)
    mass = tl.zeros((LANES,), ACC)
    upper_left = zeros_of_classes(CLASSES, LANES, ACC)
    upper_right = zeros_of_classes(CLASSES, LANES, ACC)
    slot = (batch * tl.num_programs(1) + band).to(tl.int64) * (ROWS + 1)
    corner_ptr = corners_ptr + slot * (2 * CLASSES * w) + cell
    for i in range(band * ROWS, band * ROWS + ROWS):
        lower_left = zeros_of_classes(CLASSES, LANES, ACC)
        lower_right = zeros_of_classes(CLASSES, LANES, ACC)
        for row in range(first_output(i, h, height), first_output(i + 1, h, height)):
            lefts, slopes = logits_along_row(
                rows_ptr, batch, row, cell, h, w, height, CLASSES, PITCH, ACC
            )
            start = (batch * height + row).to(tl.int64) * width
            # Gradient of the row's logits, summed with weight 1 and g.
            level = zeros_of_classes(CLASSES, LANES, ACC)
            moment = zeros_of_classes(CLASSES, LANES, ACC)
            for step in range(tl.max(end - first)):
                column = first + step
                inside = (column < end) & (cell < w)
                label = tl.load(target_ptr + start + column, mask=inside, other=0).to(tl.int32)
                counted = inside & (label != ignore_index)
                if HARD_ONLY:
                    known = tl.load(losses_ptr + start + column, mask=inside, other=0.0)
                    # Written so that NaN counts.
                    counted = counted & ((known >= tl.load(hardest_ptr)) | ~(known <= easy))
                g = beyond(column, cell, w, width, ACC)
                logits = logits_at(lefts, slopes, g)
                exponentials, total, top = _exponentials(logits)
                loss = _cross_entropy(logits, total, top, label)
                v = tl.where(counted, 1, 0).to(ACC)
                if WEIGHTED:
                    is_class = (label >= 0) & (label < CLASSES)
                    v = tl.load(weight_ptr + label, mask=counted & is_class, other=0.0).to(ACC)
                v = tl.where(counted & (loss != loss), loss, v)
                loss_sum += tl.where(counted, v * loss, 0)
                mass += v
                if GRADIENT:
                    gradient = _softmax_gradient(exponentials, total, label, v)
                    level = _add_scaled(level, gradient, 1)
                    moment = _add_scaled(moment, gradient, g)
            if GRADIENT:
                f = beyond(row, i, h, height, ACC)
                level = _add_scaled(level, moment, -1)
                upper_left = _add_scaled(upper_left, level, 1 - f)
                upper_right = _add_scaled(upper_right, moment, 1 - f)
                lower_left = _add_scaled(lower_left, level, f)
                lower_right = _add_scaled(lower_right, moment, f)
        if GRADIENT:
            _store_classes(corner_ptr, upper_left, cell < w, CLASSES, w)
            _store_classes(corner_ptr + CLASSES * w, upper_right, cell < w, CLASSES, w)
            corner_ptr += 2 * CLASSES * w
            upper_left = lower_left
            upper_right = lower_right
    if GRADIENT:
        _store_classes(corner_ptr, upper_left, cell < w, CLASSES, w)
        _store_classes(corner_ptr + CLASSES * w, upper_right, cell < w, CLASSES, w)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (batch * tl.num_programs(1) + band) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + program, tl.sum(loss_sum, axis=0))
    tl.store(sums_ptr + programs + program, tl.sum(mass, axis=0))


@kernel
def mean_kernel(sums_ptr, loss_ptr, mass_ptr, programs, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Loss and V from the pairs of `sums_kernel`; one program."""
    wait_for_predecessor()
    loss_sum = tl.zeros((BLOCK,), ACC)
    mass = tl.zeros((BLOCK,), ACC)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        loss_sum += tl.load(sums_ptr + program, mask=program < programs, other=0.0)
        mass += tl.load(sums_ptr + programs + program, mask=program < programs, other=0.0)
    total = tl.sum(mass, axis=0)
    # Without any counted pixel the loss is 0, as the sum over them is.
    tl.store(loss_ptr, tl.sum(loss_sum, axis=0) / tl.where(total == 0, 1, total))
    tl.store(mass_ptr, total)


@triton.jit
def _corner_row(corners_ptr, row, column, c, w, inside, CLASSES: tl.constexpr):
    """(COLUMNS, classes): what the cells of one band give to one low-resolution row of it."""
    base = corners_ptr + row.to(tl.int64) * (2 * CLASSES * w)
    from_right = tl.load(base + c * w + column, mask=inside, other=0.0)
    from_left = tl.load(
        base + (CLASSES + c) * w + (column - 1), mask=inside & (column > 0), other=0.0
    )
    return from_right + from_left


@kernel
def logits_gradient_kernel(
    corners_ptr, mass_ptr, grad_loss_ptr, grad_ptr, h, w,
    CLASSES: tl.constexpr, CLASS_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss / V times the sum of the corners. Grid (blocks of columns, h, N)."""
    wait_for_predecessor()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    c = tl.arange(0, CLASS_BLOCK)[None, :]
    inside = (column < w) & (c < CLASSES)
    i = tl.program_id(1)
    batch = tl.program_id(2)
    band = i // ROWS
    first_of_batch = batch * tl.cdiv(h, ROWS)
    row = (first_of_batch + band) * (ROWS + 1) + i % ROWS
    total = _corner_row(corners_ptr, row, column, c, w, inside, CLASSES)
    # The first row of a band is also below the last cells of the band above.
    shared = inside & (i % ROWS == 0) & (band > 0)
    total += _corner_row(corners_ptr, row - 1, column, c, w, shared, CLASSES)
    mass = tl.load(mass_ptr)
    scale = tl.load(grad_loss_ptr).to(ACC) / tl.where(mass == 0, 1, mass)
    grad_row_ptr = grad_ptr + (batch * h + i).to(tl.int64) * w * CLASSES
    value = (total * scale).to(grad_ptr.dtype.element_ty)
    tl.store(grad_row_ptr + column * CLASSES + c, value, mask=inside)

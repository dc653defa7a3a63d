"""The kernels of the fused upsampling and cross entropy; upsample_loss.py has the maths."""

from __future__ import annotations

import triton
import triton.language as tl

from lgcnet_fast.kernels.bilinear import beyond, first_output
from lgcnet_fast.kernels.upsample_cells import columns_of_cells

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
WIDEST_GAP = tl.constexpr(64)
"""Powers of two by which what is subtracted from logits may exceed the largest: exponentials below
2^-126 are lost, which then are less than 2^-62 of the largest."""

_SHAPE = ["h", "w", "height", "width", "ignore_index"]


@triton.jit
def _zeros_of_classes(CLASSES: tl.constexpr, like):
    zeros = ()
    for _ in tl.static_range(CLASSES):
        zeros = zeros + (tl.zeros(like.shape, like.dtype),)
    return zeros


@triton.jit
def _logits_above(logits_ptr, row, cell, g, w, CLASSES: tl.constexpr, ACC: tl.constexpr):
    """log2 e (z - max z) of every class in low-resolution row `row` (of all images), `g` across
    the cell."""
    row_ptr = logits_ptr + tl.cast(row, tl.int64) * w * CLASSES
    # Nothing lies right of the last cell's left end, where g is 0.
    left_ptr = row_ptr + tl.minimum(cell, w - 1) * CLASSES
    right_ptr = row_ptr + tl.minimum(cell + 1, w - 1) * CLASSES
    logits = ()
    for c in tl.static_range(CLASSES):
        left = tl.load(left_ptr + c).to(ACC)
        right = tl.load(right_ptr + c).to(ACC)
        logits = logits + (left + g * (right - left),)
    top = logits[0]
    for c in tl.static_range(1, CLASSES):
        top = tl.maximum(top, logits[c])
    scaled = ()
    for c in tl.static_range(CLASSES):
        scaled = scaled + ((logits[c] - top) * LOG2_E,)
    return scaled


@triton.jit
def _rises(upper, lower):
    """What each class gains from the upper end of a cell to the lower, and whether a pixel between
    may have its largest logit more than WIDEST_GAP below 0."""
    rises = ()
    # No logit between the ends is below the lesser of the two, so neither is the largest one.
    largest = tl.minimum(upper[0], lower[0])
    for c in tl.static_range(len(upper)):
        rises = rises + (lower[c] - upper[c],)
        largest = tl.maximum(largest, tl.minimum(upper[c], lower[c]))
    return rises, tl.max(tl.where(largest > -WIDEST_GAP, 0, 1)) > 0


@triton.jit
def _pixel(upper, rises, f, label, WIDE: tl.constexpr):
    """exp z of every class and their sum, up to a common factor, and the loss of a pixel of every
    lane, which is NaN where the label is no class. WIDE: where gaps may be."""
    top = tl.zeros(upper[0].shape, upper[0].dtype)
    if WIDE:
        top = upper[0] + f * rises[0]
        for c in tl.static_range(1, len(upper)):
            top = tl.maximum(top, upper[c] + f * rises[c])
    total = tl.zeros(top.shape, top.dtype)
    true = tl.full(top.shape, float("nan"), top.dtype)
    exponentials = ()
    for c in tl.static_range(len(upper)):
        power = upper[c] + f * rises[c]
        if WIDE:
            power -= top
        exponential = tl.exp2(power)
        exponentials = exponentials + (exponential,)
        total += exponential
        true = tl.where(label == c, power, true)
    loss = tl.log(total) - LN_2 * true
    # Rounding may leave it below 0, which the order statistic takes for an ignored pixel.
    return exponentials, total, tl.where(loss < 0, 0, loss)


@triton.jit
def _lanes(w, width, SPREAD: tl.constexpr, LANES: tl.constexpr):
    """Of lanes (SPREAD, LANES): the cell, the first pixel column, the column behind those of the
    cell, and the most columns of a cell."""
    cell = (tl.program_id(0) * LANES + tl.arange(0, LANES))[None, :]
    first, end = columns_of_cells(cell, w, width)
    most = tl.max(end - first)
    # All of one shape and without runs that Triton knows of, so that all have the same layout.
    cell = tl.broadcast_to(tl.where(cell < w, cell, w), (SPREAD, LANES))
    return cell, first + tl.arange(0, SPREAD)[:, None], end, most


@triton.jit
def _losses_of_rows(
    upper, rises, target_ptr, losses_ptr, start, column, inside, i, h, height, width, ignore_index,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`losses_kernel` of the rows of a row of cells; start: of the image."""
    ACC: tl.constexpr = upper[0].dtype
    for row in range(first_output(i, h, height), first_output(i + 1, h, height)):
        place = start + tl.cast(row, tl.int64) * width + column
        label = tl.load(target_ptr + place, mask=inside, other=0).to(tl.int32)
        _, _, loss = _pixel(upper, rises, beyond(row, i, h, height, ACC), label, WIDE)
        loss = tl.where(label == ignore_index, -1, loss)
        tl.store(losses_ptr + place, loss.to(losses_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SHAPE)
def losses_kernel(
    logits_ptr, target_ptr, losses_ptr, h, w, height, width, ignore_index,
    CLASSES: tl.constexpr, SPREAD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Loss of every pixel, -1 where it is ignored.

    Grid (blocks of cell columns, bands of ROWS cell rows, N).
    """
    cell, first, end, most = _lanes(w, width, SPREAD, LANES)
    band = tl.program_id(1) * ROWS
    batch = tl.program_id(2)
    start = batch.to(tl.int64) * height * width
    for step in range(0, most, SPREAD):
        column = first + step
        inside = (column < end) & (cell < w)
        g = tl.where(inside, beyond(column, cell, w, width, ACC), 0)
        upper = _logits_above(logits_ptr, batch * h + band, cell, g, w, CLASSES, ACC)
        for i in range(band, tl.minimum(band + ROWS, h)):
            below = batch * h + tl.minimum(i + 1, h - 1)
            lower = _logits_above(logits_ptr, below, cell, g, w, CLASSES, ACC)
            rises, wide = _rises(upper, lower)
            if wide:
                _losses_of_rows(
                    upper, rises, target_ptr, losses_ptr, start, column, inside, i, h,
                    height, width, ignore_index, True,
                )  # fmt: skip
            else:
                _losses_of_rows(
                    upper, rises, target_ptr, losses_ptr, start, column, inside, i, h,
                    height, width, ignore_index, False,
                )  # fmt: skip
            upper = _added(upper, rises)


@triton.jit
def _added(values, others):
    sums = ()
    for c in tl.static_range(len(values)):
        sums = sums + (values[c] + others[c],)
    return sums


@triton.jit
def _sums_of_rows(
    upper, rises, above, below, loss_sum, mass, target_ptr, weight_ptr, losses_ptr, hardest_ptr,
    start, column, inside, i, h, height, width, ignore_index, easy,
    WEIGHTED: tl.constexpr, HARD_ONLY: tl.constexpr, GRADIENT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds what the rows of a row of cells give: v (softmax - [c = label]) to `above` and `below`
    with the weights of the two low-resolution rows, and v l and v; start: of the image."""
    ACC: tl.constexpr = upper[0].dtype
    for row in range(first_output(i, h, height), first_output(i + 1, h, height)):
        place = start + tl.cast(row, tl.int64) * width + column
        label = tl.load(target_ptr + place, mask=inside, other=0).to(tl.int32)
        counted = inside & (label != ignore_index)
        if HARD_ONLY:
            known = tl.load(losses_ptr + place, mask=inside, other=0.0)
            # Written so that NaN counts.
            counted = counted & ((known >= tl.load(hardest_ptr)) | ~(known <= easy))
        f = beyond(row, i, h, height, ACC)
        exponentials, total, loss = _pixel(upper, rises, f, label, WIDE)
        v = tl.where(counted, 1, 0).to(ACC)
        if WEIGHTED:
            is_class = (label >= 0) & (label < len(upper))
            v = tl.load(weight_ptr + label, mask=counted & is_class, other=0.0).to(ACC)
        v = tl.where(counted & (loss != loss), loss, v)
        loss_sum += tl.where(counted, v * loss, 0)
        mass += v
        if GRADIENT:
            scale = v / total
            more_above = ()
            more_below = ()
            for c in tl.static_range(len(upper)):
                gradient = scale * exponentials[c] - tl.where(label == c, v, 0)
                more_above = more_above + (above[c] + (1 - f) * gradient,)
                more_below = more_below + (below[c] + f * gradient,)
            above = more_above
            below = more_below
    return above, below, loss_sum, mass


@triton.jit
def _store_corners(
    corner_ptr, sums, g, inside, MORE: tl.constexpr, CLASSES: tl.constexpr, PITCH: tl.constexpr
):
    """What the lanes' columns give to the ends of their cells; MORE: to what is stored already."""
    for c in tl.static_range(CLASSES):
        of_right = g * sums[c]
        right = tl.broadcast_to(tl.sum(of_right, axis=0, keep_dims=True), g.shape)
        left = tl.broadcast_to(tl.sum(sums[c] - of_right, axis=0, keep_dims=True), g.shape)
        left_ptr = corner_ptr + c * PITCH
        right_ptr = corner_ptr + (CLASSES + c) * PITCH
        if MORE:
            left += tl.load(left_ptr, mask=inside, other=0.0)
            right += tl.load(right_ptr, mask=inside, other=0.0)
        tl.store(left_ptr, left, mask=inside)
        tl.store(right_ptr, right, mask=inside)


@triton.jit(do_not_specialize=[*_SHAPE, "easy"])
def sums_kernel(
    logits_ptr, target_ptr, weight_ptr, losses_ptr, hardest_ptr, corners_ptr, sums_ptr,
    h, w, height, width, ignore_index, easy,
    CLASSES: tl.constexpr, PITCH: tl.constexpr,
    SPREAD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr, HARD_ONLY: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of v l and of v, a pair a program, and the corner sums of the gradient.

    Grid (blocks of cell columns, bands of ROWS cell rows, N). Corner sums are stored as
    (N, bands, ROWS + 1, 2, CLASSES, PITCH >= w): for the low-resolution rows around and inside the
    band, what the cells right of a column (0) and those left of it, under their own column (1),
    give to it.
    """
    cell, first, end, most = _lanes(w, width, SPREAD, LANES)
    band = tl.program_id(1)
    batch = tl.program_id(2)
    start = batch.to(tl.int64) * height * width
    slot = (batch * tl.num_programs(1) + band).to(tl.int64) * (ROWS + 1)
    # One lane of a cell stores.
    owner = (tl.arange(0, SPREAD)[:, None] == 0) & (cell < w)
    loss_sum = tl.zeros((SPREAD, LANES), ACC)
    mass = tl.zeros((SPREAD, LANES), ACC)
    # Once at least, as the corner sums of cells without a pixel are read too.
    for step in range(0, tl.maximum(most, 1), SPREAD):
        column = first + step
        inside = (column < end) & (cell < w)
        g = tl.where(inside, beyond(column, cell, w, width, ACC), 0)
        corner_ptr = corners_ptr + slot * (2 * CLASSES * PITCH) + cell
        upper = _logits_above(logits_ptr, batch * h + band * ROWS, cell, g, w, CLASSES, ACC)
        above = _zeros_of_classes(CLASSES, g)
        for i in range(band * ROWS, tl.minimum(band * ROWS + ROWS, h)):
            next_row = batch * h + tl.minimum(i + 1, h - 1)
            lower = _logits_above(logits_ptr, next_row, cell, g, w, CLASSES, ACC)
            rises, wide = _rises(upper, lower)
            below = _zeros_of_classes(CLASSES, g)
            if wide:
                above, below, loss_sum, mass = _sums_of_rows(
                    upper, rises, above, below, loss_sum, mass,
                    target_ptr, weight_ptr, losses_ptr, hardest_ptr,
                    start, column, inside, i, h, height, width, ignore_index, easy,
                    WEIGHTED, HARD_ONLY, GRADIENT, True,
                )  # fmt: skip
            else:
                above, below, loss_sum, mass = _sums_of_rows(
                    upper, rises, above, below, loss_sum, mass,
                    target_ptr, weight_ptr, losses_ptr, hardest_ptr,
                    start, column, inside, i, h, height, width, ignore_index, easy,
                    WEIGHTED, HARD_ONLY, GRADIENT, False,
                )  # fmt: skip
            if GRADIENT:
                if step > 0:
                    _store_corners(corner_ptr, above, g, owner, True, CLASSES, PITCH)
                else:
                    _store_corners(corner_ptr, above, g, owner, False, CLASSES, PITCH)
                corner_ptr += 2 * CLASSES * PITCH
                above = below
            upper = _added(upper, rises)
        if GRADIENT:
            if step > 0:
                _store_corners(corner_ptr, above, g, owner, True, CLASSES, PITCH)
            else:
                _store_corners(corner_ptr, above, g, owner, False, CLASSES, PITCH)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (batch * tl.num_programs(1) + band) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + program, tl.sum(loss_sum))
    tl.store(sums_ptr + programs + program, tl.sum(mass))


@triton.jit
def mean_kernel(sums_ptr, loss_ptr, mass_ptr, programs, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Loss and V from the pairs of `sums_kernel`; one program."""
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
def _corner_row(corners_ptr, row, column, c, inside, CLASSES: tl.constexpr, PITCH: tl.constexpr):
    """(COLUMNS, classes): what the cells of one band give to one low-resolution row of it."""
    base = corners_ptr + row.to(tl.int64) * (2 * CLASSES * PITCH)
    from_right = tl.load(base + c * PITCH + column, mask=inside, other=0.0)
    from_left = tl.load(
        base + (CLASSES + c) * PITCH + (column - 1), mask=inside & (column > 0), other=0.0
    )
    return from_right + from_left


@triton.jit
def logits_gradient_kernel(
    corners_ptr, mass_ptr, grad_loss_ptr, grad_ptr, h, w,
    CLASSES: tl.constexpr, PITCH: tl.constexpr, CLASS_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss / V times the sum of the corners. Grid (blocks of columns, h, N)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    c = tl.arange(0, CLASS_BLOCK)[None, :]
    inside = (column < w) & (c < CLASSES)
    i = tl.program_id(1)
    batch = tl.program_id(2)
    band = i // ROWS
    first_of_batch = batch * tl.cdiv(h, ROWS)
    row = (first_of_batch + band) * (ROWS + 1) + i % ROWS
    total = _corner_row(corners_ptr, row, column, c, inside, CLASSES, PITCH)
    # The first row of a band is also below the last cells of the band above.
    shared = inside & (i % ROWS == 0) & (band > 0)
    total += _corner_row(corners_ptr, row - 1, column, c, shared, CLASSES, PITCH)
    mass = tl.load(mass_ptr)
    scale = tl.load(grad_loss_ptr).to(ACC) / tl.where(mass == 0, 1, mass)
    grad_row_ptr = grad_ptr + (batch * h + i).to(tl.int64) * w * CLASSES
    value = (total * scale).to(grad_ptr.dtype.element_ty)
    tl.store(grad_row_ptr + column * CLASSES + c, value, mask=inside)

"""Label map at full size from low-resolution logits, without full-resolution logits.

Bilinear with aligned corners, interpolated in float32 (float64 for float64); ties go to the
lowest class. Least traffic: the logits once, one byte a pixel; 4 operations a class and pixel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import Size, beyond, first_output
from lgcnet_fast.kernels.common import accumulator, check_like
from lgcnet_fast.kernels.launches import kernel
from lgcnet_fast.kernels.upsample_cells import (
    CellConfig,
    check_logits,
    class_rows,
    columns_of_cells,
    logits_along_row,
    logits_at,
)

ARGMAX = CellConfig(lanes=32, rows=1, warps=1)


def upsample_argmax_forward(
    logits: Tensor, size: Size, out: Tensor | None = None, config: CellConfig = ARGMAX
) -> Tensor:
    """Logits (N, classes, h, w), NHWC, at most 32 classes -> uint8 labels (N, *size).

    Raises `ValueError`.
    """
    check_logits(logits, size)
    batch, _, _, w = logits.shape
    if out is None:
        out = logits.new_empty((batch, *size), dtype=torch.uint8)
    check_like("out", out, (batch, *size), logits)
    if out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"out: {out.dtype} of strides {out.stride()}, need contiguous uint8")
    argmax_of_rows(class_rows(logits), w, out, config)
    return out


def argmax_of_rows(rows: Tensor, width: int, out: Tensor, config: CellConfig = ARGMAX) -> None:
    """rows: logits (N, h, classes, pitch) float32 or float64, `width` columns of which count, at
    most 32 classes; writes uint8 labels (N, height, width), contiguous. Arguments are trusted."""
    batch, h, classes, pitch = rows.shape
    grid = (triton.cdiv(width, config.lanes), triton.cdiv(h, config.rows), batch)
    _argmax_kernel[grid](
        rows, out, h, width, *out.shape[1:],
        CLASSES=classes, PITCH=pitch, LANES=config.lanes, ROWS=config.rows,
        ACC=accumulator(rows.dtype), num_warps=config.warps,
    )  # fmt: skip


@kernel(programmatic=False, do_not_specialize=["h", "w", "height", "width"])
def _argmax_kernel(
    rows_ptr, out_ptr, h, w, height, width,
    CLASSES: tl.constexpr, PITCH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of cell columns, bands of ROWS cell rows, N)."""
    cell = tl.program_id(0) * LANES + tl.arange(0, LANES)
    i = tl.program_id(1) * ROWS
    batch = tl.program_id(2)
    first, end = columns_of_cells(cell, w, width)
    for row in range(first_output(i, h, height), first_output(i + ROWS, h, height)):
        lefts, slopes = logits_along_row(
            rows_ptr, batch, row, cell, h, w, height, CLASSES, PITCH, ACC
        )
        out_row_ptr = out_ptr + (batch * height + row).to(tl.int64) * width
        for step in range(tl.max(end - first)):
            column = first + step
            logits = logits_at(lefts, slopes, beyond(column, cell, w, width, ACC))
            best = logits[0]
            label = tl.zeros((LANES,), tl.int32)
            for c in tl.static_range(1, CLASSES):
                label = tl.where(logits[c] > best, c, label)
                best = tl.maximum(best, logits[c])
            tl.store(out_row_ptr + column, label.to(tl.uint8), mask=(column < end) & (cell < w))

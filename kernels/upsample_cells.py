"""Final upsampling a cell at a time: what the loss and the argmax of a segmenter share.

Four neighbouring low-resolution logits enclose a cell, and every full-resolution pixel lies in
one cell. A lane owns one cell column j; its logits at output row o are, for a fraction g across
the cell, `left + g slope`: the vertical interpolation is done once a row, and a pixel then costs
one multiply-add a class. Values of all classes stay in registers, as a tuple of one tensor a class,
so full-resolution logits never exist in memory.

Logits are read as rows (N, h, classes, PITCH >= w) of the accumulator's dtype: neighbouring cells
are neighbours in memory, and the constant distance between classes costs no address arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.bilinear import beyond, check_size, first_output, lower_input
from lgcnet_fast.kernels.common import accumulator_dtype, check_map


@dataclass(frozen=True)
class CellConfig:
    """Work of one program: `rows` rows of cells in `lanes` neighbouring columns, one a lane."""

    lanes: int
    rows: int
    warps: int


MAX_CLASSES = 32
"""More would not fit into registers."""


@triton.jit
def zeros_of_classes(CLASSES: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(CLASSES):
        zeros = zeros + (tl.zeros((LANES,), ACC),)
    return zeros


@triton.jit
def logits_along_row(
    rows_ptr, batch, row, cell, h, w, height,
    CLASSES: tl.constexpr, PITCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Logits at output row `row`, a class each: at the cells' left ends, and the rise across."""
    i = lower_input(row, h, height)
    f = beyond(row, i, h, height, ACC)
    upper = rows_ptr + (batch * h + i).to(tl.int64) * (CLASSES * PITCH) + cell
    lower = upper + (tl.minimum(i + 1, h - 1) - i) * (CLASSES * PITCH)
    inside = cell < w
    # Nothing lies right of the last cell's left end; 0 there, as g is.
    has_right = cell + 1 < w
    lefts = ()
    slopes = ()
    for c in tl.static_range(CLASSES):
        upper_left = tl.load(upper + c * PITCH, mask=inside, other=0.0)
        lower_left = tl.load(lower + c * PITCH, mask=inside, other=0.0)
        upper_right = tl.load(upper + (c * PITCH + 1), mask=has_right, other=0.0)
        lower_right = tl.load(lower + (c * PITCH + 1), mask=has_right, other=0.0)
        left = upper_left + f * (lower_left - upper_left)
        lefts = lefts + (left,)
        slopes = slopes + (upper_right + f * (lower_right - upper_right) - left,)
    return lefts, slopes


@triton.jit
def logits_at(lefts, slopes, g):
    """Logits of one pixel of every cell, `g` across its cell."""
    logits = ()
    for c in tl.static_range(len(lefts)):
        logits = logits + (lefts[c] + g * slopes[c],)
    return logits


@triton.jit
def columns_of_cells(cell, w, width):
    """The first pixel column of each cell and the first beyond it."""
    return first_output(cell, w, width), first_output(cell + 1, w, width)


def class_rows(logits: Tensor) -> Tensor:
    """Logits (N, classes, h, w) as rows (N, h, classes, pitch); beyond w they are undefined."""
    batch, classes, h, w = logits.shape
    rows = torch.empty(
        (batch, h, classes, triton.cdiv(w, 32) * 32),
        dtype=accumulator_dtype(logits.dtype),
        device=logits.device,
    )
    rows[..., :w] = logits.permute(0, 2, 1, 3)
    return rows


def check_logits(logits: Tensor, size: Sequence[int]) -> None:
    """Raises `ValueError` unless these are NHWC logits that the cell kernels can upsample."""
    check_map("logits", logits)
    check_size("size of logits", logits.shape[2:])
    check_size("size", size)
    if logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"logits: {logits.shape[1]} classes, at most {MAX_CLASSES} fit")

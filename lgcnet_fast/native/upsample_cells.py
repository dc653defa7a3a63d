"""What the launchers of the fused final upsampling share: see csrc/upsample_cells.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lgcnet_fast.native.launcher import Extent, Launcher, check_grid
from lgcnet_fast.native.operands import VIEW, check_map, view_of

Size = tuple[int, int]

MAX_CLASSES = 32
"""kMaxClasses of the kernels."""
MAX_SIZE = 2**15
CELLS = 32
"""kCells of the kernels: columns of cells a block."""
BLOCK = (128, 1, 1)
"""kCellThreads of the kernels."""

LOGITS = np.dtype(
    [
        ("logits", VIEW),
        ("classes", "i4"),
        *[
            (f"{side}_{axis}", "i4")
            for side in ("source", "target")
            for axis in ("height", "width")
        ],
        ("rows", "i4"),
    ],
    align=True,
)


def check_logits(logits: Tensor, size: Sequence[int], launcher: Launcher) -> None:
    """Raises `ValueError` unless these are NHWC logits that the kernels can upsample to `size`."""
    check_map("logits", logits, launcher)
    if logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"logits: {logits.shape[1]} classes, at most {MAX_CLASSES} fit")
    for name, lengths in (("size of logits", logits.shape[2:]), ("size", size)):
        if len(lengths) != 2 or not all(1 <= length <= MAX_SIZE for length in lengths):
            raise ValueError(f"{name}: {tuple(lengths)}, need two numbers from 1 to {MAX_SIZE}")


def logits_fields(logits: Tensor, size: Size, rows: int) -> tuple[object, ...]:
    """The fields of LOGITS."""
    return view_of(logits), logits.shape[1], *logits.shape[2:], *size, rows


def cell_grid(logits: Tensor, rows: int) -> Extent:
    """Blocks of cells, bands of `rows` rows of cells, images."""
    if rows < 1:
        raise ValueError(f"rows: {rows}, need at least 1")
    images, _, height, width = logits.shape
    grid = (-(-width // CELLS), -(-height // rows), images)
    check_grid("logits", grid)
    return grid

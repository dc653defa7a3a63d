"""Launcher of the label map at full size, without full-resolution logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import STORAGE, check_same, pack
from lgcnet_fast.native.upsample_cells import (
    BLOCK,
    LOGITS,
    Size,
    cell_grid,
    check_logits,
    logits_fields,
)

ARGUMENTS = np.dtype([("logits", LOGITS), ("labels", "u8")], align=True)


def upsample_argmax_forward(
    logits: Tensor,
    size: Size,
    out: Tensor | None = None,
    *,
    rows: int = 1,
    launcher: Launcher | None = None,
) -> Tensor:
    """Logits (N, classes, h, w), NHWC, at most 32 classes -> uint8 labels (N, *size).

    Ties go to the lowest class. `out` is contiguous. A block goes down `rows` rows of cells. Raises
    `ValueError` for arguments that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    check_logits(logits, size, launcher)
    shape = (logits.shape[0], *size)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=logits.device)
    check_same("out", out, shape, torch.uint8, logits.device)
    if not out.is_contiguous():
        raise ValueError(f"out: strides {out.stride()}, need a contiguous tensor")
    arguments = pack(ARGUMENTS, (logits_fields(logits, size, rows), out.data_ptr()))
    instance = instances.upsample_argmax(STORAGE[logits.dtype])
    launcher.launch(instance, cell_grid(logits, rows), BLOCK, arguments, logits.device)
    return out

"""Launcher of csrc/sums.cuh: the second stage of every reduction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.operands import pack

ARGUMENTS = np.dtype([("partial", "u8"), ("total", "u8"), ("count", "i4"), ("width", "i4")])


def sum_partials(partial: Tensor, launcher: Launcher) -> Tensor:
    """(count, ...) -> (...), float32 and contiguous, in an order that depends on `count` alone."""
    total = torch.empty_like(partial[0])
    width = total.numel()
    fields = (partial.data_ptr(), total.data_ptr(), partial.shape[0], width)
    launcher.launch(
        instances.sum_partials(),
        (-(-width // 32), 1, 1),
        (32, instances.SUM_LANES, 1),
        pack(ARGUMENTS, fields),
        partial.device,
    )
    return total

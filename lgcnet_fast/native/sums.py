"""Launcher of csrc/sums.cuh: the second stage of every reduction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.operands import pack

ARGUMENTS = np.dtype([("partial", "u8"), ("total", "u8"), ("count", "i4"), ("width", "i4")])


def sum_partials(partial: Tensor, launcher: Launcher, groups: bool = False) -> Tensor:
    """(count, ...) -> (...), float32 and contiguous, in an order that depends on `count` alone.

    groups: (groups, count, ...) -> (groups, ...), each as if by itself.
    """
    several = partial if groups else partial[None]
    total = torch.empty_like(several[:, 0])
    count, width = several.shape[1], total[0].numel()
    grid = (-(-width // 32), len(several), 1)
    check_grid("sum_partials", grid)
    launcher.launch(
        instances.sum_partials(),
        grid,
        (32, instances.SUM_LANES, 1),
        pack(ARGUMENTS, (partial.data_ptr(), total.data_ptr(), count, width)),
        partial.device,
    )
    return total if groups else total[0]

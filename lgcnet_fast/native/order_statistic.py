"""Launchers of csrc/order_statistic.cuh: the loss of the last of the hardest pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import check_dense, pack

COUNT_ARGUMENTS = np.dtype(
    [
        *[(name, "u8") for name in ("losses", "state", "counts")],
        ("pixels", "i8"),
        ("shift", "i4"),
    ],
    align=True,
)

SELECT_ARGUMENTS = np.dtype(
    [
        *[(name, "u8") for name in ("counts", "state", "hardest")],
        ("keep", "f8"),
        ("blocks", "i4"),
        ("shift", "i4"),
    ],
    align=True,
)

BLOCKS = 1024
"""At most, where that leaves no thread more than a 16-bit counter can hold."""
MOST_PIXELS = 2**15
"""Of a thread."""


def hardest_loss(losses: Tensor, keep: float, *, launcher: Launcher | None = None) -> Tensor:
    """Scalar float32: the ceil(keep * valid)-th largest loss, infinite if that number is 0.

    losses: contiguous float32, negative where a pixel does not count; `valid` is the number of
    the others. keep: 0 to 1. A NaN ranks as infinite. The device is never waited for.
    """
    launcher = launcher or load()
    check_dense("losses", losses, tuple(losses.shape), torch.float32, losses.device)
    threads, pixels, device = instances.COUNT_THREADS, losses.numel(), losses.device
    blocks = max(min(BLOCKS, -(-pixels // (64 * threads))), -(-pixels // (MOST_PIXELS * threads)))
    counts = torch.empty(blocks, instances.DIGITS, dtype=torch.int32, device=device)
    state = torch.zeros(2, dtype=torch.int64, device=device)
    hardest = torch.empty((), dtype=torch.float32, device=device)
    for shift in (24, 16, 8, 0):
        to_count = (losses.data_ptr(), state.data_ptr(), counts.data_ptr(), pixels, shift)
        launcher.launch(
            instances.count_digits(),
            (blocks, 1, 1),
            (threads, 1, 1),
            pack(COUNT_ARGUMENTS, to_count),
            device,
        )
        buffers = (counts.data_ptr(), state.data_ptr(), hardest.data_ptr())
        launcher.launch(
            instances.select_digit(),
            (1, 1, 1),
            (instances.DIGITS, 1, 1),
            pack(SELECT_ARGUMENTS, (*buffers, keep, blocks, shift)),
            device,
        )
    return hardest

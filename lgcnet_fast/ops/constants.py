"""Small constant tensors: copied to a device once, not in every step.

A copy from the host would wait for the device, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_Table = dict[tuple[Any, torch.device], Tensor]
_process_wide: _Table = {}
_here: ContextVar[_Table | None] = ContextVar("constants", default=None)


def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """`torch.tensor(values)` on `device`; nobody may write to it."""
    table = _here.get()
    table = _process_wide if table is None else table
    if (values, device) not in table:
        # Made outside inference mode, so that training can use it too.
        with torch.inference_mode(False):
            table[values, device] = torch.tensor(values, device=device)
    return table[values, device]


@contextmanager
def separate_constants() -> Iterator[None]:
    """None of the constants inside the `with` block is one from outside, nor stays: for tensors
    without data.
    """
    token = _here.set({})
    try:
        yield
    finally:
        _here.reset(token)

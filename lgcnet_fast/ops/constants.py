"""Small constant tensors: copied to a device once, not in every step.

A copy from the host would wait for the device, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_Table = dict[tuple[Any, ...], Any]
_process_wide: _Table = {}
_here: ContextVar[_Table | None] = ContextVar("constants", default=None)


def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """`torch.tensor(values)` on `device`; nobody may write to it."""
    return made_once(_tensor, values, device)


def made_once(make: Callable[..., T], *arguments: Any) -> T:
    """`make(*arguments)`, tensors to which nobody may write, from its first call.

    The first call must come before capturing a CUDA graph.
    """
    table = _here.get()
    table = _process_wide if table is None else table
    key = (make, *arguments)
    if key not in table:
        # Made outside inference mode, so that training can use it too.
        with torch.inference_mode(False):
            table[key] = make(*arguments)
    made: T = table[key]
    return made


def _tensor(values: tuple[Any, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


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

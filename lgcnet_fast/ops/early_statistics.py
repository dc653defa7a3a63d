"""Batch statistics of maps, taken by whoever makes them, beside other work, for the node to find.

A node needs the statistics of all its maps before it can sum, and nothing else runs meanwhile. Most
of the maps are there long before the last one. Inside `early_statistics` they are known by the
addresses of their maps, which are held until the node has asked: no other tensor can have taken
their memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from lgcnet_fast.ops.backend import supposing


@dataclass
class _Known:
    held: Tensor
    statistics: Tensor
    """(3, k, C) of a map or a stack of k."""
    eps: float
    readers: int
    """That have not asked yet."""


_here: ContextVar[dict[int, _Known] | None] = ContextVar("early_statistics", default=None)


@contextmanager
def early_statistics() -> Iterator[None]:
    """For a forward pass, in which every map that has statistics goes into a node."""
    token = _here.set(None if supposing() else {})
    try:
        yield
    finally:
        _here.reset(token)


def takes_early() -> bool:
    """Whether this is such a pass."""
    return _here.get() is not None


def keep_statistics(ys: Sequence[Tensor], statistics: Tensor, eps: float) -> None:
    """ys: maps or stacks of them, of several readers where they come again; statistics: of each
    map once, (3, K, C), in the order in which they come first."""
    known = _here.get()
    assert known is not None
    first = 0
    for y in ys:
        if y.data_ptr() in known:
            known[y.data_ptr()].readers += 1
            continue
        count = len(y) if y.ndim == 5 else 1
        own = statistics[:, first : first + count]
        known[y.data_ptr()] = _Known(y.detach(), own, eps, readers=1)
        first += count


def kept_statistics(ys: Sequence[Tensor], eps: float) -> Tensor | None:
    """(3, K, C) of the maps of a node, for one reader; None unless those of all are there."""
    known = _here.get()
    if known is None:
        return None
    found = [known.get(y.data_ptr()) for y in ys]
    for y, one in zip(ys, found, strict=True):
        if one is not None:
            one.readers -= 1
            if one.readers == 0:
                known.pop(y.data_ptr(), None)
    if any(one is None or one.eps != eps for one in found):
        return None
    parts = [one.statistics for one in found if one is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

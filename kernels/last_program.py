"""Reductions of two stages in one launch: the last program of a group to finish does the second.

The programs of a group store their shares and count themselves; the one that counts last reads the
shares of all, in a fixed order. Which one that is changes from run to run, the bits do not.
"""

from __future__ import annotations

from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

POOL = 2**20
"""Counters of a device, 4 MiB."""
_LINE = 32
"""Counters of a cache line: a launch has its own, aligned alike, so that all compile to one."""

_pools: dict[torch.device, Tensor] = {}
_taken = 0
_lock = Lock()


@triton.jit
def finishes_last(counter_ptr, programs):
    """Whether of so many programs with this counter all others have counted themselves already.

    If so, this one may read what they stored before the call, past its L1 cache (".cg"). The
    counter is back at zero for the next launch.
    """
    # All threads have stored before one of them counts the program. That one releases what they
    # stored and acquires what others did, and the barrier on its result passes it on.
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = before == programs - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


def take_counters(count: int, device: torch.device) -> Tensor:
    """(count,) int32, all zero, for one launch, which must leave them so.

    Launches take theirs from a pool of the device, one after the other, and from its start again
    once it is used up. Two that share some must not run at the same time: as a launch takes some
    32 of 2^20 counters, one of them is the 30,000th after the other, be it eager or captured in a
    graph, which keeps its counters. Training has all of them on one stream or on streams that
    are joined in every step, of about 250 such launches.

    A launch that is aborted may leave counters that are not zero; after such an error CUDA allows
    no other launch in the process. The first call for a device must come before capturing a CUDA
    graph; otherwise raises `RuntimeError`.
    """
    global _taken
    lines = triton.cdiv(count, _LINE) * _LINE
    with _lock:
        pool = _pools.get(device)
        if pool is None:
            pool = _pools[device] = _make_pool(device)
        if _taken + lines > POOL:
            _taken = 0
        first, _taken = _taken, _taken + lines
    return pool[first : first + count]


def _make_pool(device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(POOL, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("reductions ran for the first time while a CUDA graph was captured")
    pool = torch.zeros(POOL, dtype=torch.int32, device=device)
    # The next launch may be on another stream.
    torch.cuda.current_stream(device).synchronize()
    return pool

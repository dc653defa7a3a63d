"""Work that only fills a cache on disk, spread over processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from lgcnet_fast.errors import DeviceError

MOST_PROCESSES = 16
"""Each holds a context of its own on the GPU, about half a gigabyte."""

Enough = Callable[[int], bool]
"""Whether so many items, from the first on, are enough."""


def all_of_them(done: int) -> bool:
    """Never enough."""
    return False


def in_processes(
    work: Callable[[str], None],
    items: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
    enough: Enough = all_of_them,
) -> int:
    """Calls `work`, which must be picklable, with the items in turn; what it raises is raised here.

    Returns how many of the items, from the first on, are done when all are, or when this is
    `enough`. `progress` is called with this number, as it grows, and that of all.

    Raises `DeviceError` if a process dies, as it does where memory ends.
    """
    done = 0
    with process_pool(min(cores(), MOST_PROCESSES, len(items))) as pool:
        for done, _ in enumerate(pool.map(work, items), start=1):
            progress(done, len(items))
            if enough(done):
                break
    return done


@contextmanager
def process_pool(
    processes: int, start: Callable[..., object] | None = None, arguments: Sequence[Any] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Processes that call `start` first. What they have not begun at the end is left undone.

    Raises `DeviceError` for a result that is lost because a process died.
    """
    # Processes that are forked from one that uses a GPU cannot use it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, start, tuple(arguments))
    try:
        yield pool
    except BrokenProcessPool:
        raise DeviceError(
            f"a process that compiled kernels died, one of {processes}; probably memory ended: "
            "free some, or allow fewer cores (taskset)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Work that only fills a cache on disk, spread over processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from lgcnet_fast.errors import DeviceError

MOST_PROCESSES = 16
"""Each holds a context of its own on the GPU, about half a gigabyte."""


def in_processes(
    work: Callable[[str], None],
    items: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Calls `work`, which must be picklable, with every item; what it raises is raised here.

    `progress` is called with the number of items done and of all.

    Raises `DeviceError` if a process dies, as it does where memory ends.
    """
    processes = min(cores(), MOST_PROCESSES, len(items))
    # Processes that are forked from one that uses a GPU cannot use it.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            for done, _ in enumerate(pool.map(work, items), start=1):
                progress(done, len(items))
    except BrokenProcessPool:
        raise DeviceError(
            f"a process that compiled kernels died, one of {processes}; probably memory ended: "
            "free some, or allow fewer cores (taskset)"
        ) from None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""How much memory is free, and so where a cache should lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from lgcnet_fast.errors import DataError

Storage = Literal["disk", "ram", "gpu"]
Wanted = Literal["auto", "disk", "ram", "gpu"]


def choose_storage(wanted: Wanted, size: int, device: torch.device) -> Storage:
    """Where `size` bytes go. `auto`: GPU below a quarter of its free memory, RAM below half.

    Raises `DataError` when the GPU is asked for on a CPU run.
    """
    if wanted == "gpu" and device.type != "cuda":
        raise DataError(f'data.cache = "gpu" on device {device}; set it to "auto"')
    if wanted != "auto":
        return wanted
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
        return "gpu"
    return "ram" if size < free_host_memory() / 2 else "disk"


def free_host_memory() -> int:
    """Bytes that this process could still use, the limit of its control group included."""
    free = _available()
    limit, used = _read_number("memory.max"), _read_number("memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Without /proc (macOS): half of the physical memory is a guess on the safe side.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_number(name: str) -> int | None:
    """A number of this process's control group (version 2); none without a limit."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return None

"""What the two routes to the kernels have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

import numpy as np
import torch

from lgcnet_fast.native.instances import Instance

Extent = tuple[int, int, int]
"""A CUDA grid (in blocks) or block (in threads): x, y, z."""

MAX_GRID = (2**31 - 1, 65535, 65535)


class Launcher(ABC):
    """Puts kernels on the current stream of a device."""

    route: str
    """Name of the route, for messages."""

    device_type = "cuda"
    """Where tensors must be, in torch's words."""

    hopper = False
    """Whether it has kernels with sm_90's own instructions (csrc/hopper.cuh)."""

    @abstractmethod
    def launch(
        self,
        instance: Instance,
        grid: Extent,
        block: Extent,
        arguments: np.ndarray,
        device: torch.device,
        shared: int = 0,
    ) -> None:
        """Starts a kernel, whose argument struct is `arguments`, and returns at once.

        shared: bytes of shared memory a block, beside what the kernel declares itself.
        """

    def processors(self, device: torch.device) -> int:
        """Multiprocessors of the device."""
        return _processors(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_grid(what: str, grid: Extent) -> None:
    """Raises `ValueError` where CUDA cannot number that many blocks."""
    if any(size > most for size, most in zip(grid, MAX_GRID, strict=True)):
        raise ValueError(f"{what}: needs a grid of {grid} blocks, CUDA allows {MAX_GRID}")

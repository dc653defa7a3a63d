"""Temperature and learning rates as functions of the epoch or step, counted from 0."""

from __future__ import annotations

import math

import torch


def temperature(epoch: int, epochs: int, start: float, end: float) -> float:
    """Linear from `start` in the first epoch to `end` in the last (LGCNet section 5).

    A search of a single epoch uses `start`.
    """
    if epochs == 1:
        return start
    return end + (start - end) * (1 - epoch / (epochs - 1))


def cosine(step: int, steps: int, highest: float, lowest: float = 0.0) -> float:
    """Half a cosine from `highest` at step 0 towards `lowest` at step `steps`."""
    return lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * step / steps))


def poly(step: int, steps: int, highest: float, power: float) -> float:
    """highest * (1 - step / steps) ** power."""
    return highest * (1 - step / steps) ** power


def exponential(epoch: int, highest: float, decay: float) -> float:
    """highest * decay ** epoch."""
    return highest * decay**epoch


def warmup(epoch: float, epochs: int) -> float:
    """Factor that rises linearly to 1 over the first `epochs`."""
    return 1.0 if epochs == 0 else min(1.0, (epoch + 1) / epochs)


class DeviceScalar:
    """A scheduled number: set on the host between steps, read on the device during them.

    A step that is captured in a CUDA graph would keep a Python number for ever.
    """

    def __init__(self, value: float, device: torch.device) -> None:
        self.value = value
        self.tensor = torch.full((), value, dtype=torch.float32, device=device)
        """Scalar float32; its address never changes."""

    def set(self, value: float) -> None:
        """Takes effect for the steps enqueued from now on; does not wait for the device."""
        self.value = value
        self.tensor.fill_(value)

"""Where the kernels of a CUDA graph find the frame that they are to work on.

The host does nothing for a frame but write two addresses into a slot in pinned memory, which the
GPU reads, and launch the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SLOTS = 64
"""Frames that the host may be ahead of the GPU: it then waits for the older half."""


class Slots:
    """The addresses of images and labels of the frames on their way, in the order of launches.

    image, labels: uint8, on the device of the kernels; what these read and write until the first
    frame. Launches follow each other on the GPU: a graph starts with `take`, and other kernels
    find this frame's image and labels at `image` and `labels`. One thread at a time. Before the
    first frame, graphs may be launched without frames, to compile and load their kernels.
    """

    def __init__(self, image: Tensor, labels: Tensor) -> None:
        from lgcnet_fast.kernels.addresses import AtAddress

        own = [image.data_ptr(), labels.data_ptr()]
        pinned = image.device.type == "cuda"
        self._slots = torch.tensor([own] * SLOTS, dtype=torch.int64, pin_memory=pinned)
        self._turn = torch.zeros(1, dtype=torch.int32, device=image.device)
        self._taken = torch.tensor(own, dtype=torch.int64, device=image.device)
        self.image = AtAddress(self._taken[:1], tuple(image.shape))
        self.labels = AtAddress(self._taken[1:], tuple(labels.shape))
        # Stores into it take a tenth of the time of those into a tensor or an array.
        self._memory: memoryview[int] = self._slots.view(-1).numpy().data
        self._next = 0
        self._in_step = False
        self._read = (torch.cuda.Event(), torch.cuda.Event())
        """Of each half of the slots, behind the last launch that reads one."""

    def take(self) -> None:
        """The first launch of a graph."""
        from lgcnet_fast.kernels.addresses import take_slot

        take_slot(self._slots, self._turn, self._taken)

    def run(self, launch: Callable[[], object], image: int, labels: int) -> None:
        """image, labels: addresses; launch: of the graph, on the current stream.

        Both must stay what they are until the GPU is done with this frame: memory of PyTorch that
        the current stream uses does, even if it is freed.
        """
        if not self._in_step:
            self._next = int(self._turn.item())
        # Whether an interrupt in here comes before or behind the launch, only the GPU can tell.
        self._in_step = False
        self.write(image, labels)
        launch()
        self._next += 1
        half, within = divmod(self._next, SLOTS // 2)
        if within == 0:
            self._read[half - 1].record()
            self._next %= SLOTS
        self._in_step = True

    def write(self, image: int, labels: int) -> None:
        """Into the slot of the next launch, once the GPU has read it for the last time."""
        half, within = divmod(self._next, SLOTS // 2)
        if within == 0:
            self._read[half].synchronize()
        self._memory[2 * self._next] = image
        self._memory[2 * self._next + 1] = labels


@dataclass(frozen=True)
class SlotCalls:
    """The launches of a network on the frames of its slots; `last` writes the labels."""

    slots: Slots
    calls: tuple[Callable[[], object], ...]
    last: Callable[[], object]

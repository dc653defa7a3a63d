"""Streams of frames: upload, computation and download of neighbouring frames overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lgcnet_fast.deploy.images import pixels_of

Frame = NDArray[np.uint8]
SLOTS = 2


def labels_of_frames(
    segment: Callable[[Tensor], Tensor], frames: Iterable[Frame], device: torch.device
) -> Iterator[Frame]:
    """Label maps (H, W) of frames (H, W, 3), in order; segment: uint8 image to label map.

    On a GPU up to two frames are on their way; `segment` runs on the current stream. Raises
    `DataError` for what is no RGB uint8 frame.
    """
    if device.type != "cuda":
        for frame in frames:
            yield segment(pixels_of(frame)).cpu().numpy()
        return
    with torch.cuda.device(device):
        free = deque(_Slot(device) for _ in range(SLOTS))
        busy: deque[_Slot] = deque()
        for frame in frames:
            if not free:
                yield busy[0].result()
                free.append(busy.popleft())
            slot = free.popleft()
            slot.submit(pixels_of(frame), segment)
            busy.append(slot)
        for slot in busy:
            yield slot.result()


class _Slot:
    """Pinned and device memory of one frame on its way, and streams of its own for the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._upload, self._download = torch.cuda.Stream(), torch.cuda.Stream()
        self._frame = torch.empty(0)
        self._image = self._labels = self._result = torch.empty(0, device=device)

    def submit(self, frame: Tensor, segment: Callable[[Tensor], Tensor]) -> None:
        """Only after `result` of the frame before."""
        if self._frame.shape != frame.shape:
            self._allocate(frame.shape)
        self._frame.copy_(frame)
        current = torch.cuda.current_stream()
        with torch.cuda.stream(self._upload):
            self._image.copy_(self._frame, non_blocking=True)
        current.wait_stream(self._upload)
        self._labels = segment(self._image)
        self._download.wait_stream(current)
        with torch.cuda.stream(self._download):
            self._result.copy_(self._labels, non_blocking=True)

    def result(self) -> Frame:
        """Waits for the label map."""
        self._download.synchronize()
        return self._result.numpy().copy()

    def _allocate(self, shape: tuple[int, ...]) -> None:
        self._frame = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self._result = torch.empty(shape[:2], dtype=torch.uint8, pin_memory=True)
        self._image = torch.empty(shape, dtype=torch.uint8, device=self._device)
        # What is allocated on one stream and first written on another must be ready there.
        self._upload.wait_stream(torch.cuda.current_stream())

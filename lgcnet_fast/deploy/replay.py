"""Networks in memory as CUDA graphs, one for each input size and batch, and their replay."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.deploy.arena import STREAMS, Schedule
from lgcnet_fast.deploy.fused import Call, FusedNetwork
from lgcnet_fast.deploy.graph_pointers import Pointer, graph_to_change, pointers_to
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.deploy.operations import Size
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.program import FoldedNetwork
from lgcnet_fast.ops.compile_ahead import compile_ahead
from lgcnet_fast.recording import recording

MOST_REPLAYS = 8
"""Sizes kept at once, each with maps and graph of its own; that unused for longest goes first."""
ALIGNMENT = 16
"""Bytes; Triton and PyTorch make kernels for pointers that are multiples of it."""

Key = tuple[int, int, int, bool]


class NetworkInMemory(Protocol):
    """For images of one size and number; `image` takes them, `calls` start its launches."""

    image: Tensor
    calls: tuple[Call, ...]
    schedule: Schedule

    @property
    def size(self) -> Size: ...

    def write_labels(self, labels: Tensor) -> None: ...


Network = TypeVar("Network", bound=NetworkInMemory)


class GraphEngine(ABC, Generic[Network]):
    """Label maps of batches of images, through plans that are made when a size is first seen.

    Threads may share it: one at a time hands its work to the GPU, and work on different CUDA
    streams waits for one another, because all of it uses the same maps. On the CPU, where kernels
    are interpreted, there are no graphs.
    """

    def __init__(self, network: FoldedNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self._network, self._device, self._dtype = network, device, dtype
        self._replays: OrderedDict[Key, Replay[Network]] = OrderedDict()
        self._lock = threading.Lock()
        # Kernels start on the current GPU. Whoever enters holds the lock.
        self._on_device: AbstractContextManager[object] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        with self._on_device:
            self._turns = Turns() if device.type == "cuda" else None

    @abstractmethod
    def _in_memory(self, size: Size, batch: int, pixels: torch.dtype) -> Network:
        """pixels: dtype of the images."""

    def labels(self, pixels: Tensor, size: Size | None) -> Tensor:
        """uint8 (N, H, W, 3) on the device to uint8 (N, H, W); size: of the network's input."""
        batch, height, width, _ = pixels.shape
        with self._lock, self._on_device:
            if size is None or size == (height, width):
                return self._replay((batch, height, width, False)).labels_of(pixels)
            return self._replay((batch, *size, True)).labels_of_resized(pixels)

    def network(self, batch: int, size: Size) -> Network:
        """The network in memory for images of this size, which its replay uses too."""
        with self._lock, self._on_device:
            return self._replay((batch, *size, False)).network

    @torch.inference_mode(False)
    @torch.no_grad()
    def rehearse(self, batch: int, size: Size) -> None:
        """Starts all kernels for images of this size once, one after another, and keeps nothing."""
        with self._lock, self._on_device:
            network = self._in_memory(size, batch, torch.uint8)
            for call in network.calls:
                call()
            network.write_labels(network.image.new_empty(network.image.shape[:3]))

    def start(self, batch: int, size: Size) -> Call:
        """What starts the launches for images of this size and no copies, to be timed."""
        with self._lock, self._on_device:
            return self._replay((batch, *size, False)).run

    def _replay(self, key: Key) -> Replay[Network]:
        if key in self._replays:
            self._replays.move_to_end(key)
            return self._replays[key]
        if len(self._replays) == MOST_REPLAYS:
            if self._turns is not None:
                self._turns.finish()
            self._replays.popitem(last=False)
        self._replays[key] = self._made(key)
        return self._replays[key]

    # What is made here is written to later, maybe outside inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _made(self, key: Key) -> Replay[Network]:
        batch, height, width, is_resized = key
        pixels = torch.float32 if is_resized else torch.uint8
        network = self._in_memory((height, width), batch, pixels)
        return Replay(network, not is_resized, self._turns)


class FusedEngine(GraphEngine[FusedNetwork]):
    """The fused plan."""

    def __init__(self, network: FoldedNetwork, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(network, device, dtype)
        self._packing = Packing(device, dtype)

    def _in_memory(self, size: Size, batch: int, pixels: torch.dtype) -> FusedNetwork:
        return FusedNetwork(lower(self._network, size, batch, self._packing), self._device, pixels)


class Turns:
    """What the graphs of an engine share, as only one of them runs at a time.

    Memory for what calls allocate, which so does not grow with the sizes that come and go; the
    streams to record on, as memory is kept by stream; the end of the work before.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.main, *self.sides = (torch.cuda.Stream() for _ in range(STREAMS))
        self._done = torch.cuda.Event()
        self._device = torch.cuda.current_device()
        self._stream: torch.cuda.Stream | None = None
        self._handle: int | None = None

    def begin(self) -> None:
        """On the current stream, which waits for earlier work if that is on another one."""
        # Every frame asks: the handle alone takes a tenth of the time of `current_stream`.
        handle = torch._C._cuda_getCurrentRawStream(self._device)
        if handle != self._handle:
            self._stream, self._handle = torch.cuda.current_stream(), handle
            self._done.wait(self._stream)

    def end(self) -> None:
        """Of the work since `begin`."""
        self._done.record(self._stream)

    def finish(self) -> None:
        """Waits until the GPU needs no maps and no graph any more."""
        self._done.synchronize()


class Replay(Generic[Network]):
    """A network that runs as one CUDA graph, to the labels or only to the logits.

    Its kernels read the image where the caller holds it and write the labels where the caller gets
    them, if the graph lets them (`graph_pointers`); otherwise both are copied. turns: of the
    engine, on a GPU.
    """

    def __init__(self, network: Network, with_labels: bool, turns: Turns | None) -> None:
        self.network = network
        self._image = network.image
        self._labels = network.image.new_empty(network.image.shape[:3], dtype=torch.uint8)
        last = [lambda: network.write_labels(self._labels)] if with_labels else []
        self._launch: Call = _one_after_another([*network.calls, *last])
        self._source: Pointer | None = None
        self._target: Pointer | None = None
        self._begin: Call = _nothing
        self._end: Call = _nothing
        if turns is not None:
            self._begin, self._end = turns.begin, turns.end
            graph = _recorded(self._launch, network, last, turns)
            self._launch = graph.replay
            self._source, self._target = pointers_to(graph, (self._image, self._labels))

    def run(self) -> None:
        """The launches alone, on the image and to the labels of this object."""
        if self._source is not None:
            self._source.set(self._image.data_ptr())
        if self._target is not None:
            self._target.set(self._labels.data_ptr())
        self._launch()

    def labels_of(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) of the network's size to uint8 (N, H, W). Raises `DeviceError`."""
        self._begin()
        try:
            self._take(pixels)
            if self._target is None:
                self._launch()
                return self._labels.clone()
            labels = torch.empty_like(self._labels)
            self._target.set(labels.data_ptr())
            self._launch()
            return labels
        finally:
            self._end()

    def labels_of_resized(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) of any size to uint8 (N, H, W); resized as `network_input` does.

        Raises `DeviceError`.
        """
        floats = pixels.permute(0, 3, 1, 2).float()
        resized = F.interpolate(floats, self.network.size, mode="bilinear")
        self._begin()
        try:
            self._take(resized.permute(0, 2, 3, 1))
            self._launch()
            labels = pixels.new_empty(pixels.shape[:3])
            self.network.write_labels(labels)
            return labels
        finally:
            self._end()

    def _take(self, pixels: Tensor) -> None:
        """Launches that follow read these pixels, in place or as a copy.

        In place is safe without further ado: what follows runs on the current stream, as any
        operation on `pixels` would.
        """
        if self._source is None:
            self._image.copy_(pixels)
        elif _can_stand_in(pixels, self._image):
            self._source.set(pixels.data_ptr())
        else:
            self._image.copy_(pixels)
            self._source.set(self._image.data_ptr())


def _can_stand_in(pixels: Tensor, image: Tensor) -> bool:
    """Whether kernels made for `image` give the same result at the address of `pixels`."""
    return (
        pixels.dtype is image.dtype
        and pixels.shape == image.shape
        and pixels.get_device() == image.get_device()
        and pixels.is_contiguous()
        and pixels.data_ptr() % ALIGNMENT == 0
    )


def _one_after_another(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _nothing() -> None:
    """On the CPU work is over when a call returns."""


def _recorded(
    run: Call, network: NetworkInMemory, last: Sequence[Call], turns: Turns
) -> torch.cuda.CUDAGraph:
    """The launches of a network as a graph in which independent ones overlap, then `last`.

    `run` does the same, one after another.
    """
    graph = graph_to_change()
    turns.main.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(turns.main):
        compile_ahead(run)
        # Loads the kernels, which a recording must not.
        run()
    with recording(graph, turns.main, pool=turns.pool):
        _overlapping(network.calls, network.schedule, turns.sides)
        for call in last:
            call()
    return graph


def _overlapping(
    calls: Sequence[Call], order: Schedule, sides: Sequence[torch.cuda.Stream]
) -> None:
    """Each call on the stream of its launch; afterwards the current stream has waited for all."""
    current = torch.cuda.current_stream()
    sides = sides[: max(order.streams)]
    streams = [current, *sides]
    for side in sides:
        side.wait_stream(current)
    done: list[torch.cuda.Event] = []
    for call, at, waits in zip(calls, order.streams, order.waits, strict=True):
        with torch.cuda.stream(streams[at]):
            for launch in waits:
                done[launch].wait()
            call()
            event = torch.cuda.Event()
            event.record()
            done.append(event)
    for side in sides:
        current.wait_stream(side)

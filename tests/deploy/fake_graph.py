"""A CUDA graph and the driver that knows it, on the CPU: a frame of two kernels."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.deploy.graph_pointers import (
    INVALID_VALUE,
    KERNEL,
    KernelParameters,
)

CONTEXT = 0x5500_0000_0010
GRAPH, EXECUTABLE = 7, 8
FIRST, LAST = 11, 12
"""Nodes: the first kernel adds 1 to the reds of an image, the last takes them over as labels."""
EMPTY = 5


class Arguments:
    """Those of a kernel, one after another in memory of their own, as a graph holds them."""

    def __init__(self, values: list[bytes]) -> None:
        self.values = [ctypes.create_string_buffer(value, len(value)) for value in values]
        addresses = [ctypes.addressof(value) for value in self.values]
        self.list = (ctypes.c_void_p * len(values))(*addresses)

    def raw(self) -> list[bytes]:
        return [value.raw for value in self.values]


class FakeGraph:
    """In the place of torch's graph and of the driver's library.

    Its arguments: (image, pixels as int32, map) and (scale as float32, a structure of two integers
    and the labels' address, map, pixels). `library`: kernels have handles of the newer kind.
    """

    def __init__(self, image: Tensor, labels: Tensor, library: bool = False) -> None:
        self.image, self.labels, self.library = image, labels, library
        self.map = torch.zeros_like(labels)
        pixels = struct.pack("<i", labels.numel())
        self.values = {
            FIRST: [address(image), pixels, address(self.map)],
            LAST: [
                struct.pack("<f", 0.1),
                struct.pack("<qqQ", -1, 3, labels.data_ptr()),
                address(self.map),
                pixels,
            ],
        }
        self.kinds = {10: EMPTY, FIRST: KERNEL, LAST: KERNEL}
        self.now = dict(self.values)
        self.updates: list[int] = []
        self.codes: list[int] = []
        """Of the next updates; success when used up."""
        self.current: int | None = CONTEXT
        self.instantiated = 0
        self._held: list[Arguments] = []

    # Of torch's graph.

    def instantiate(self) -> None:
        self.instantiated += 1

    def raw_cuda_graph(self) -> int:
        return GRAPH

    def raw_cuda_graph_exec(self) -> int:
        assert self.instantiated
        return EXECUTABLE

    def replay(self) -> None:
        image, pixels, map_of_first = self.now[FIRST]
        _, structure, map_of_last, _ = self.now[LAST]
        count = int.from_bytes(pixels, "little")
        reds = ctypes.string_at(int.from_bytes(image, "little"), 3 * count)[::3]
        put(map_of_first, bytes((red + 1) % 256 for red in reds))
        put(structure[16:], ctypes.string_at(int.from_bytes(map_of_last, "little"), count))

    # Of the driver.

    def cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:
        assert graph.value == GRAPH
        if nodes is not None:
            nodes[:] = list(self.kinds)
        count._obj.value = len(self.kinds)
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = self.kinds[node.value]
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, found: Any) -> int:
        arguments = Arguments(self.values[node.value])
        self._held.append(arguments)
        handle = 1000 + node.value
        found._obj.function = None if self.library else handle
        found._obj.kernel = handle if self.library else None
        found._obj.context = CONTEXT if self.library else None
        found._obj.grid[:] = (5, 6, 7)
        found._obj.block[:] = (32, 1, 1)
        found._obj.shared_bytes = 48
        found._obj.arguments = ctypes.addressof(arguments.list)
        return 0

    def cuFuncGetParamInfo(self, handle: Any, index: Any, offset: Any, size: Any) -> int:
        assert not self.library
        return self._size(handle, index, offset, size)

    def cuKernelGetParamInfo(self, handle: Any, index: Any, offset: Any, size: Any) -> int:
        assert self.library
        return self._size(handle, index, offset, size)

    def _size(self, handle: Any, index: Any, offset: Any, size: Any) -> int:
        values = self.values[handle.value - 1000]
        if index.value >= len(values):
            return INVALID_VALUE
        offset._obj.value = sum(map(len, values[: index.value]))
        size._obj.value = len(values[index.value])
        return 0

    def cuGraphExecKernelNodeSetParams_v2(self, graph: Any, node: Any, new: Any) -> int:
        assert graph.value == EXECUTABLE
        assert self.current is not None  # The real one crashes.
        self.updates.append(node.value)
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            self.now[node.value] = self._given(node.value, new._obj)
        return code

    def _given(self, node: int, parameters: KernelParameters) -> list[bytes]:
        assert (parameters.kernel if self.library else parameters.function) == 1000 + node
        assert list(parameters.grid) == [5, 6, 7] and list(parameters.block) == [32, 1, 1]
        assert parameters.shared_bytes == 48 and not parameters.extra
        sizes = [len(value) for value in self.values[node]]
        places = (ctypes.c_void_p * len(sizes)).from_address(parameters.arguments)
        return [ctypes.string_at(place, size) for place, size in zip(places, sizes, strict=True)]

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.current
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.current = context.value
        return 0

    def cuGetErrorName(self, code: Any, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_SOMETHING"
        return 0


def address(buffer: Tensor) -> bytes:
    return struct.pack("<Q", buffer.data_ptr())


def put(target: bytes, content: bytes) -> None:
    ctypes.memmove(int.from_bytes(target, "little"), content, len(content))

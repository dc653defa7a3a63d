"""Copies within a CUDA graph whose far ends move from replay to replay.

A graph holds addresses, but every frame comes in memory of its own and its labels leave in memory
of their own. As nodes of the graph the two copies cost the host nothing while the addresses stay,
as they do where a caller reuses a buffer and drops the labels, and one call of the driver each
where they do not. Frames that are on their way keep the addresses that they started with.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lgcnet_fast.errors import DeviceError

LIBRARY = "libcuda.so.1"
SUCCESS = 0
INVALID_CONTEXT = 201
"""Also where a thread has called nothing of the CUDA runtime, which would make one current."""

IS_SUPPORTED = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec")
"""By this PyTorch, which must keep a recorded graph and tell its handles."""
COPY_NODE = 1

End = Literal["source", "target"]
_Handle = ctypes.c_void_p
_Place = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)


class CopyParameters(ctypes.Structure):
    """CUDA_MEMCPY3D of cuda.h."""

    _fields_ = [
        *zip(
            ("source_x", "source_y", "source_z", "source_level", "source_kind"), _Place, strict=True
        ),
        ("source_host", _Handle),
        ("source", ctypes.c_uint64),
        ("source_array", _Handle),
        ("reserved_0", _Handle),
        ("source_pitch", ctypes.c_size_t),
        ("source_height", ctypes.c_size_t),
        *zip(
            ("target_x", "target_y", "target_z", "target_level", "target_kind"), _Place, strict=True
        ),
        ("target_host", _Handle),
        ("target", ctypes.c_uint64),
        ("target_array", _Handle),
        ("reserved_1", _Handle),
        ("target_pitch", ctypes.c_size_t),
        ("target_height", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    ]


class CopyNode:
    """One end of a copy in a graph, which `move` sets for the replays that follow.

    driver: its library. executable: handle of the instantiated graph, context: of its device.
    """

    def __init__(
        self,
        driver: Any,
        executable: int,
        context: int | None,
        node: int,
        parameters: CopyParameters,
        end: End,
    ) -> None:
        self._driver, self._parameters, self._end = driver, parameters, end
        self._context = _Handle(context)
        self._arguments = (
            _Handle(executable),
            _Handle(node),
            ctypes.byref(parameters),
            self._context,
        )
        self._address: int | None = None

    def move(self, address: int) -> None:
        """To memory on the device of the graph. Raises `DeviceError` for another kind of memory."""
        if address == self._address:
            return
        self._address = None
        setattr(self._parameters, self._end, address)
        code = self._driver.cuGraphExecMemcpyNodeSetParams(*self._arguments)
        if code == INVALID_CONTEXT:
            _check(self._driver, self._driver.cuCtxSetCurrent(self._context), "context")
            code = self._driver.cuGraphExecMemcpyNodeSetParams(*self._arguments)
        _check(self._driver, code, f"the {self._end} of a copy")
        self._address = address


@lru_cache(maxsize=1)
def cuda_driver() -> Any | None:
    """None where it has another name than on Linux. Its calls release the GIL."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def are_plain(target: Tensor, source: Tensor) -> bool:
    """That copying the one to the other is copying bytes, in their order, within one device."""
    return (
        source.dtype is target.dtype
        and source.device == target.device
        and source.shape == target.shape
        and source.is_contiguous()
        and target.is_contiguous()
    )


def copy_nodes(
    driver: Any, graph: torch.cuda.CUDAGraph, source: int, target: int
) -> tuple[CopyNode, CopyNode]:
    """Of the copies from address `source` and to address `target`, which replays then move.

    graph: recorded, kept and instantiated. Raises `DeviceError` where the driver recorded something
    else or cannot move them.
    """
    context = _Handle()
    _check(driver, driver.cuCtxGetCurrent(ctypes.byref(context)), "context")
    executable = graph.raw_cuda_graph_exec()
    found = {
        end: CopyNode(driver, executable, context.value, node, parameters, end)
        for node, parameters in _copies(driver, graph.raw_cuda_graph())
        for end in _ends(parameters, source, target)
    }
    if len(found) != 2:
        raise DeviceError("CUDA graph: the driver recorded something else than the two copies")
    found["source"].move(source)
    found["target"].move(target)
    return found["source"], found["target"]


def _ends(parameters: CopyParameters, source: int, target: int) -> list[End]:
    ends: list[End] = []
    if parameters.source == source:
        ends.append("source")
    if parameters.target == target:
        ends.append("target")
    return ends


def _copies(driver: Any, graph: int) -> list[tuple[int, CopyParameters]]:
    """Copy nodes of a graph."""
    count = ctypes.c_size_t()
    _check(driver, driver.cuGraphGetNodes(_Handle(graph), None, ctypes.byref(count)), "nodes")
    nodes = (ctypes.c_uint64 * count.value)()
    _check(driver, driver.cuGraphGetNodes(_Handle(graph), nodes, ctypes.byref(count)), "nodes")
    copies = []
    for node in nodes:
        kind, parameters = ctypes.c_int(), CopyParameters()
        _check(driver, driver.cuGraphNodeGetType(_Handle(node), ctypes.byref(kind)), "nodes")
        if kind.value == COPY_NODE:
            asked = driver.cuGraphMemcpyNodeGetParams(_Handle(node), ctypes.byref(parameters))
            _check(driver, asked, "a copy")
            copies.append((node, parameters))
    return copies


def _check(driver: Any, code: int, what: str) -> None:
    if code != SUCCESS:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
        told = name.value.decode() if name.value else f"error {code}"
        raise DeviceError(f"CUDA graph, {what}: the CUDA driver says {told}")

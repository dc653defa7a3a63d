"""Addresses that the kernels of a CUDA graph read from and write to, changed between its replays.

A graph holds the arguments of its kernels. That of the one kernel which reads the image of a frame
becomes the memory in which the image came, and so does that of the kernel which writes the labels,
so that nothing is copied: the driver takes new arguments for a node of an instantiated graph
(cuGraphExecKernelNodeSetParams), which count for later launches; those on their way keep theirs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.errors import DeviceError

log = logging.getLogger(__name__)

LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
CALLS = (
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuFuncGetParamInfo",
    "cuGetErrorName",
    "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphGetNodes",
    "cuGraphKernelNodeGetParams_v2",
    "cuGraphNodeGetType",
    "cuKernelGetParamInfo",
)
"""Of the driver, the latest of them since CUDA 12.4."""
HAS_HANDLES = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec")
"""Whether PyTorch tells those of its graphs, as it does since 2.9."""

SUCCESS, INVALID_VALUE = 0, 1
KERNEL, MEMSET, EMPTY = 0, 2, 5
"""Kinds of nodes."""
WORD = 8

_thread = threading.local()
"""`has_context`: a context is current in this thread."""


class KernelParameters(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h; `kernel` and `context` count where `function` is 0."""

    _fields_ = [
        ("function", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("arguments", c_void_p),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    ]


class KernelNode:
    """A kernel in a graph, and its arguments as recorded, in memory of this object.

    executable: handle of the instantiated graph; context: of its device. `arguments` are words of
    eight bytes each, the last of which may be filled up, `sizes` their bytes. Raises `DeviceError`
    where the driver does not tell them.
    """

    def __init__(self, driver: Any, executable: int, context: c_void_p, node: int) -> None:
        self._driver, self._context = driver, context
        recorded = KernelParameters()
        code = driver.cuGraphKernelNodeGetParams_v2(c_void_p(node), byref(recorded))
        _check(driver, code, "a kernel")
        self.sizes = _argument_sizes(driver, recorded)
        if self.sizes and not recorded.arguments:
            raise DeviceError("CUDA graph: a kernel was recorded without a list of its arguments")
        self.arguments = [
            _words(address, size)
            for address, size in zip(_addresses(recorded, len(self.sizes)), self.sizes, strict=True)
        ]
        addresses = [ctypes.addressof(words) for words in self.arguments]
        self._list = (c_void_p * len(addresses))(*addresses)
        self._parameters = KernelParameters.from_buffer_copy(recorded)
        self._parameters.arguments = ctypes.addressof(self._list)
        self._set = driver.cuGraphExecKernelNodeSetParams_v2
        self._update = (c_void_p(executable), c_void_p(node), byref(self._parameters))

    def update(self) -> None:
        """Launches that follow have the arguments of now. Raises `DeviceError`."""
        if not hasattr(_thread, "has_context"):
            _ensure_context(self._driver, self._context)
        _check(self._driver, self._set(*self._update), "the arguments of a kernel")


class Pointer:
    """The word of a kernel's arguments that holds the address of a buffer."""

    def __init__(self, kernel: KernelNode, argument: int, at: int) -> None:
        self._kernel, self._words, self._at = kernel, kernel.arguments[argument], at
        self._address: int | None = self._words[at]

    def set(self, address: int) -> None:
        """For the launches that follow. Raises `DeviceError`."""
        if address == self._address:
            return
        self._address = None
        self._words[self._at] = address
        self._kernel.update()
        self._address = address


def graph_to_change() -> torch.cuda.CUDAGraph:
    """One whose kernels can be found after its recording, where PyTorch and the driver tell."""
    if not HAS_HANDLES or cuda_driver() is None:
        log.info("CUDA graphs keep their addresses: PyTorch or the CUDA driver is too old")
        return torch.cuda.CUDAGraph()
    return torch.cuda.CUDAGraph(keep_graph=True)


def pointers_to(graph: torch.cuda.CUDAGraph, buffers: Sequence[Tensor]) -> list[Pointer | None]:
    """Where kernels of a graph from `graph_to_change`, recorded, take the addresses of buffers.

    None for a buffer whose address had better stay as it is, see `pointer_to`; for all of them
    where PyTorch or the driver is too old, or nodes of the graph hide what they read and write.
    Pointers need the graph, which the caller keeps.
    """
    driver = cuda_driver()
    if not HAS_HANDLES or driver is None:
        return [None] * len(buffers)
    graph.instantiate()
    try:
        kernels = kernel_nodes(driver, graph)
    except DeviceError as error:
        log.info("CUDA graph keeps its addresses: %s", error)
        return [None] * len(buffers)
    return [pointer_to(buffer, kernels) for buffer in buffers]


def pointer_to(buffer: Tensor, kernels: Sequence[KernelNode]) -> Pointer | None:
    """The only word among the arguments of all kernels that points into a buffer, to its start.

    Otherwise None: a second kernel, or one that starts in the middle, would go on with the old
    memory. Words are looked for within arguments too, as PyTorch's kernels take structures.
    """
    start = buffer.data_ptr()
    end = start + buffer.nbytes
    found = [
        (kernel, argument, at)
        for kernel in kernels
        for argument, (words, size) in enumerate(zip(kernel.arguments, kernel.sizes, strict=True))
        for at in range(size // WORD)
        if start <= words[at] < end
    ]
    if len(found) != 1:
        log.info("CUDA graph keeps an address: %d arguments point into its buffer", len(found))
        return None
    kernel, argument, at = found[0]
    return Pointer(kernel, argument, at) if kernel.arguments[argument][at] == start else None


def kernel_nodes(driver: Any, graph: torch.cuda.CUDAGraph) -> list[KernelNode]:
    """Of an instantiated graph. Raises `DeviceError`, also where other nodes could copy."""
    executable, context = graph.raw_cuda_graph_exec(), c_void_p()
    _check(driver, driver.cuCtxGetCurrent(byref(context)), "the context")
    kernels = []
    for node in _nodes(driver, graph.raw_cuda_graph()):
        kind = c_int()
        _check(driver, driver.cuGraphNodeGetType(c_void_p(node), byref(kind)), "a node")
        if kind.value == KERNEL:
            kernels.append(KernelNode(driver, executable, context, node))
        elif kind.value not in (MEMSET, EMPTY):
            raise DeviceError(f"CUDA graph: a node of kind {kind.value} may read or write buffers")
    return kernels


@lru_cache(maxsize=1)
def cuda_driver() -> Any | None:
    """None where it is missing or lacks one of `CALLS`. Its calls release the GIL."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    return driver if all(hasattr(driver, call) for call in CALLS) else None


def _nodes(driver: Any, graph: int) -> list[int]:
    count = c_size_t()
    _check(driver, driver.cuGraphGetNodes(c_void_p(graph), None, byref(count)), "nodes")
    nodes = (c_uint64 * count.value)()
    _check(driver, driver.cuGraphGetNodes(c_void_p(graph), nodes, byref(count)), "nodes")
    return list(nodes)


def _argument_sizes(driver: Any, recorded: KernelParameters) -> list[int]:
    """Bytes of each."""
    if recorded.function:
        ask, handle = driver.cuFuncGetParamInfo, recorded.function
    else:
        ask, handle = driver.cuKernelGetParamInfo, recorded.kernel
    sizes: list[int] = []
    while True:
        offset, size = c_size_t(), c_size_t()
        code = ask(c_void_p(handle), c_size_t(len(sizes)), byref(offset), byref(size))
        # As the driver says behind the last one.
        if code == INVALID_VALUE:
            return sizes
        _check(driver, code, "the arguments of a kernel")
        sizes.append(size.value)


def _addresses(recorded: KernelParameters, number: int) -> list[int]:
    """Where the graph holds the arguments."""
    return list((c_uint64 * number).from_address(recorded.arguments)) if number else []


def _words(address: int, size: int) -> Any:
    """A copy of what lies there."""
    words = (c_uint64 * -(-size // WORD))()
    ctypes.memmove(words, address, size)
    return words


def _ensure_context(driver: Any, context: c_void_p) -> None:
    """Makes it current where the thread has none: the driver then fails, and not with a code.

    So it is in threads that have called nothing of the CUDA runtime, which makes one current.
    """
    current = c_void_p()
    _check(driver, driver.cuCtxGetCurrent(byref(current)), "the context")
    if not current.value:
        _check(driver, driver.cuCtxSetCurrent(context), "the context")
    _thread.has_context = True


def _check(driver: Any, code: int, what: str) -> None:
    if code != SUCCESS:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(c_int(code), byref(name))
        told = name.value.decode() if name.value else f"error {code}"
        raise DeviceError(f"CUDA graph, {what}: the CUDA driver says {told}")

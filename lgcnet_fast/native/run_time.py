"""The route through CuPy, which compiles the same sources at run time with NVRTC."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native import sources
from lgcnet_fast.native.instances import Instance, sum_partials
from lgcnet_fast.native.launcher import Extent, Launcher


class RunTime(Launcher):
    """Compiles each kernel when it is first launched; CuPy keeps the results on disk.

    Raises `DeviceError` where CuPy is missing or cannot compile for the current GPU.
    """

    route = "run-time compilation"

    def __init__(self) -> None:
        self._cupy = _import_cupy()
        self._try_compiling(torch.cuda.current_device())

    def launch(
        self,
        instance: Instance,
        grid: Extent,
        block: Extent,
        arguments: np.ndarray,
        device: torch.device,
        shared: int = 0,
    ) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        kernel = _compile(self._cupy, instance)
        with self._cupy.cuda.Device(index), self._cupy.cuda.ExternalStream(stream, index):
            kernel(grid, block, (arguments,), shared_mem=shared)

    def _try_compiling(self, index: int) -> None:
        try:
            with self._cupy.cuda.Device(index):
                _ = _compile(self._cupy, sum_partials()).num_regs
        # CuPy's own exceptions are compilers' messages, missing libraries and driver errors alike.
        except Exception as error:
            name = torch.cuda.get_device_name(index)
            raise DeviceError(f"CuPy cannot compile for {name}: {error}") from None


@cache
def _compile(cupy: ModuleType, instance: Instance) -> Any:
    """A callable kernel, compiled for a device when first used there."""
    module = cupy.RawModule(
        code=f'#include "{instance.source}"\n',
        options=(
            "-std=c++17",
            f"-I{sources.FOLDER}",
            # CuPy's cache looks at the text above and the options, not at what is included.
            f"-DLGCNET_SOURCES={sources.digest()}",
        ),
        name_expressions=(instance.expression,),
    )
    return module.get_function(instance.expression)


def _import_cupy() -> ModuleType:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        cuda = (torch.version.cuda or "12").split(".")[0]
        raise DeviceError(
            f"CuPy does not import ({error}); pip install 'cupy-cuda{cuda}x>=14,<15'"
        ) from None

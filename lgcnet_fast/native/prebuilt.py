"""The route through the extension that was compiled at install."""

from __future__ import annotations

import importlib
import re
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import torch

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native import build_record, sources
from lgcnet_fast.native.instances import Instance
from lgcnet_fast.native.launcher import Extent, Launcher


class Prebuilt(Launcher):
    """Raises `DeviceError` without an extension that fits the sources and the current GPU."""

    route = "prebuilt extension"

    def __init__(self) -> None:
        self._module = _import_extension()
        if self._module.sources != sources.digest():
            raise DeviceError(
                "the extension was compiled from other sources than those installed; "
                "install the package again"
            )
        _check_architecture(self._module.architectures, torch.cuda.current_device())
        self.hopper = "90" in re.findall(r"\d+", self._module.architectures)
        self._numbers = {name: number for number, name in enumerate(self._module.names())}

    def launch(
        self,
        instance: Instance,
        grid: Extent,
        block: Extent,
        arguments: np.ndarray,
        device: torch.device,
        shared: int = 0,
    ) -> None:
        number = self._numbers[instance.expression]
        same = device.index is None or device.index == torch.cuda.current_device()
        with nullcontext() if same else torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            packed = arguments.tobytes()
            self._module.launch(number, grid, block, packed, stream, shared, instance.hopper)


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, e.g. "75;80;90+PTX", runs on a GPU of that capability.

    Machine code runs within its generation from its own minor number on; PTX on all later GPUs.
    """
    wanted = 10 * capability[0] + capability[1]
    for name in architectures.split(";"):
        number = int(name.removesuffix("+PTX"))
        if number <= wanted and (name.endswith("+PTX") or number // 10 == capability[0]):
            return True
    return False


def _import_extension() -> ModuleType:
    try:
        return importlib.import_module("lgcnet_fast.native._kernels")
    except ModuleNotFoundError:
        raise DeviceError(f"no extension was compiled: {build_record.reason()}") from None
    except ImportError as error:
        raise DeviceError(f"the extension does not load: {error}") from None


def _check_architecture(architectures: str, index: int) -> None:
    capability = torch.cuda.get_device_capability(index)
    if not runs_on(architectures, capability):
        raise DeviceError(
            f"the extension holds code for {architectures}, which does not run on "
            f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]}); install "
            "again on this machine"
        )

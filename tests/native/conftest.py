"""The routes to the kernels: emulated on the CPU everywhere, and both real ones on a GPU."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lgcnet_fast import native
from lgcnet_fast.native import instances, sources
from lgcnet_fast.native.instances import Instance
from lgcnet_fast.native.launcher import Extent, Launcher
from lgcnet_fast.native.prebuilt import Prebuilt
from lgcnet_fast.native.run_time import RunTime
from lgcnet_fast.ops import backend

EMULATION = Path(__file__).with_name("emulation")


class Emulated(Launcher):
    """Runs the kernels' own source on the CPU; see emulation/device.h."""

    route = "emulation"
    device_type = "cpu"

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.kernel_name.restype = ctypes.c_char_p
        self._library.argument_bytes.restype = ctypes.c_size_t
        count = self._library.kernel_count()
        self._numbers = {self._library.kernel_name(i).decode(): i for i in range(count)}

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
        packed = arguments.tobytes()
        assert len(packed) == self._library.argument_bytes(number)
        extent = ctypes.c_uint * 3
        self._library.launch(number, extent(*grid), extent(*block), packed)

    def processors(self, device: torch.device) -> int:
        return 2

    def argument_bytes(self, instance: Instance) -> int:
        return int(self._library.argument_bytes(self._numbers[instance.expression]))


def build_emulation(folder: Path) -> Path:
    listed = folder / "kernels.inc"
    lines = (f"KERNEL({instance.expression})\n" for instance in instances.all_instances())
    listed.write_text("".join(lines))
    library = folder / "emulation.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
    command += [f"-I{EMULATION}", f"-I{sources.FOLDER}", f'-DEMULATED_KERNELS="{listed}"']
    subprocess.run([*command, str(EMULATION / "main.cpp"), "-o", str(library)], check=True)
    return library


PATIENCE = 120
"""Seconds for another process to build it."""


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Emulated:
    """Built by the first process that wants it."""
    if shutil.which("g++") is None:
        pytest.skip("the emulation needs g++")
    if worker_id == "master":
        return Emulated(build_emulation(tmp_path_factory.mktemp("emulation")))
    folder = tmp_path_factory.getbasetemp().parent / "emulation"
    library = folder / "shared.so"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + PATIENCE
        while not library.exists() and time.monotonic() < end:
            time.sleep(0.1)
    else:
        build_emulation(folder).rename(library)
    return Emulated(library)


GPU_ROUTES = {"prebuilt": Prebuilt, "run_time": RunTime}


def on_gpu(route: str) -> Launcher:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return GPU_ROUTES[route]()


@pytest.fixture(
    scope="session",
    params=["emulated", *(pytest.param(route, marks=pytest.mark.gpu) for route in GPU_ROUTES)],
)
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return on_gpu(request.param)


@pytest.fixture(scope="session", params=GPU_ROUTES)
def gpu_launcher(request: pytest.FixtureRequest) -> Launcher:
    """For maps that are too large to emulate."""
    return on_gpu(request.param)


@pytest.fixture
def device(launcher: Launcher) -> torch.device:
    return torch.device(launcher.device_type)


@pytest.fixture(autouse=True)
def exact_reference(without_tf32: None) -> None:
    """What the kernels are compared with rounds no factor."""


@pytest.fixture
def cuda_backend(emulated: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the `cuda` backend serve CPU tensors."""
    for found in pkgutil.iter_modules(native.__path__):
        if found.name in ("loader", "_kernels"):
            continue
        module = importlib.import_module(f"lgcnet_fast.native.{found.name}")
        if hasattr(module, "load"):
            monkeypatch.setattr(module, "load", lambda: emulated)
    monkeypatch.setattr(backend, "why_not", lambda name, device: None)


@pytest.fixture(scope="session")
def hopper() -> Launcher:
    launcher = on_gpu("prebuilt")
    if not launcher.hopper or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of sm_90 and the extension compiled for it")
    return launcher

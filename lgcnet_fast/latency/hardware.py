"""What a measurement was made on: device, versions, and the clocks while it ran."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from lgcnet_fast import stack
from lgcnet_fast.latency.timing import Frame

CLOCK_FIELDS = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"


@dataclass(frozen=True)
class Clocks:
    """Megahertz of a GPU under load, and the highest that it allows."""

    sm: int
    sm_max: int
    memory: int
    memory_max: int

    def __str__(self) -> str:
        return f"SM {self.sm} of {self.sm_max} MHz, memory {self.memory} of {self.memory_max} MHz"


@dataclass(frozen=True)
class Hardware:
    """Empty strings where something does not apply."""

    device: str
    driver: str
    torch: str
    cuda: str
    cpu_threads: int
    clocks: Clocks | None
    clocks_unknown: str
    """Why the clocks are not stated."""


def describe(device: torch.device, load: Frame) -> Hardware:
    """`load` keeps the device busy while its clocks are read."""
    clocks, unknown = _clocks_under_load(device, load)
    return Hardware(
        device=device_name(device),
        driver=driver(device),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        cpu_threads=torch.get_num_threads(),
        clocks=clocks,
        clocks_unknown=unknown,
    )


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name, as tables record it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor()


def driver(device: torch.device) -> str:
    """Branch of the NVIDIA driver; empty on the CPU."""
    gpus = stack.list_gpus().gpus if device.type == "cuda" else ()
    return str(gpus[0].driver) if gpus else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _clocks_under_load(device: torch.device, load: Frame) -> tuple[Clocks | None, str]:
    """The clocks, or why they are not known."""
    if device.type != "cuda":
        return None, "not read on a CPU"
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ("nvidia-smi", f"--query-gpu={CLOCK_FIELDS}", "--format=csv,noheader,nounits")
    try:
        asked = subprocess.Popen(
            (*query, "-i", identity), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        return None, f"nvidia-smi cannot be run: {error.strerror}"
    while asked.poll() is None:
        load()
        torch.cuda.synchronize(device)
    return parse_clocks(asked.communicate()[0])


def parse_clocks(answer: str) -> tuple[Clocks | None, str]:
    """From `1980, 1980, 3201, 3201`; else the answer as the reason."""
    try:
        sm, sm_max, memory, memory_max = (int(part) for part in answer.split(","))
    except ValueError:
        return None, f"nvidia-smi answered {answer.strip()[:200]!r}"
    return Clocks(sm, sm_max, memory, memory_max), ""

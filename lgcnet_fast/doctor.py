"""What runs on this machine: devices for every stage, and findings for `lgcnet doctor`.

torch is imported where it is used, so that the command line starts without it.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lgcnet_fast import stack
from lgcnet_fast.errors import DeviceError

if TYPE_CHECKING:
    import torch

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 7, 1)
NEWEST_TORCH_TRIED = (2, 13)
TRITON_CAPABILITY = (7, 0)
"""The oldest GPUs that Triton compiles for."""
OLDEST_TRITON = (3, 4)
"""The first that compiles all kernels: earlier ones return no tuples of tuples from functions."""
ROOM_GB = 5.0
"""Free memory or disk space below which a warning is due."""

Capability = tuple[int, int]


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty where all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


# -- devices ------------------------------------------------------------------------------------


def check_device(name: str) -> torch.device:
    """The device of `auto`, `cpu`, `cuda` or `cuda:N`, known to run this torch.

    `auto` takes the first GPU, and the CPU only where there is no GPU. Raises `DeviceError`
    naming the remedy if the name is another, the GPU is absent, or torch cannot run on it.
    """
    import torch

    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise DeviceError(f"device {name!r}: write auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = _why_no_cuda(torch.version.cuda, stack.list_gpus())
        if name == "auto" and not reason:
            return torch.device("cpu")
        raise DeviceError(
            f"device {name!r}: {reason or 'no NVIDIA GPU to be seen; set device to cpu'}"
        )
    index = int(match.group(1) or 0)
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0"
        )
    _check_architecture(name, index)
    return torch.device("cuda", index)


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def is_supported(capability: Capability, architectures: list[str]) -> bool:
    """Whether code for `architectures` (torch.cuda.get_arch_list()) runs on a GPU.

    Machine code (sm_XY) runs on the same major version from its minor one upwards, that of the
    a-variants on exactly their own; intermediate code (compute_XY) on any later GPU.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        kind, variant = match.group(1), match.group(4)
        built_for = (int(match.group(2)), int(match.group(3)))
        if variant == "a":
            fits = capability == built_for
        elif kind == "sm" or variant == "f":
            fits = capability[0] == built_for[0] and capability >= built_for
        else:
            fits = capability >= built_for
        if fits:
            return True
    return False


def _check_architecture(name: str, index: int) -> None:
    import torch

    capability = torch.cuda.get_device_capability(index)
    architectures = torch.cuda.get_arch_list()
    if not is_supported(capability, architectures):
        raise DeviceError(
            f"device {name!r}: {_mismatch(torch.cuda.get_device_name(index), capability)}; "
            f"{_other_stack(capability)}"
        )


def _mismatch(gpu: str, capability: Capability) -> str:
    import torch

    return (
        f"torch {torch.__version__} holds no code for {gpu} "
        f"(sm_{capability[0]}{capability[1]}; it has {', '.join(torch.cuda.get_arch_list())})"
    )


def _other_stack(capability: Capability) -> str:
    return f"install one that does: {stack.install_command(stack.stack_for(capability))}"


def _why_no_cuda(torch_cuda: str | None, listing: stack.Listing) -> str:
    """Why torch sees no GPU, with the remedy; empty where there is none or all are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    if not listing.gpus:
        complaint = listing.complaint.splitlines()[0] if listing.complaint else ""
        if not complaint or "no devices" in complaint.lower():
            return ""
        return f"nvidia-smi fails ({complaint}); repair the driver, or set device to cpu"
    gpu = listing.gpus[0]
    if torch_cuda is None:
        command = stack.install_command(stack.requirements(listing.gpus))
        return (
            f"{gpu.name} is there, but this torch is a CPU build; {command}, or set device to cpu"
        )
    needed = stack.DRIVERS.get(int(torch_cuda.split(".")[0]), 0)
    if gpu.driver < needed:
        command = stack.install_command(stack.stack_for(gpu.capability, gpu.driver))
        return (
            f"driver {gpu.driver} of {gpu.name} is too old for CUDA {torch_cuda}, which needs "
            f"{needed} or later; update it, or {command}"
        )
    return (
        f"{gpu.name} is there, but CUDA cannot use it; check CUDA_VISIBLE_DEVICES and the "
        "driver, or set device to cpu"
    )


# -- findings -------------------------------------------------------------------------------------


def diagnose(cache_folder: Path | None = None) -> list[Finding]:
    """Everything that stages depend on; `cache_folder` is where data sets will be packed."""
    return [
        _python(),
        *_torch(),
        _triton(),
        _memory(),
        _disk(cache_folder or Path.home()),
        _extra("tensorboard", "tensorboard", "TensorBoard scalars"),
        _extra("av", "video", "predictions on videos"),
        _extra("onnxruntime", "export", "checked ONNX exports"),
    ]


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", "fail", version, "use Python 3.10 or later")
    return Finding("Python", "ok", version)


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = stack.install_command(stack.requirements(stack.list_gpus().gpus))
        return [Finding("torch", "fail", str(error), remedy)]
    return [_torch_version(torch.__version__), *_gpus()]


def _torch_version(version: str) -> Finding:
    numbers = release(version)
    if numbers < OLDEST_TORCH:
        return Finding("torch", "fail", version, "pip install 'torch>=2.7.1'")
    if numbers[:2] > NEWEST_TORCH_TRIED:
        return Finding(
            "torch", "warn", f"{version}, newer than any tried", "pip install torch==2.13.0"
        )
    return Finding("torch", "ok", version)


def _gpus() -> list[Finding]:
    import torch

    cuda = torch.version.cuda or "none"
    if not torch.cuda.is_available():
        reason = _why_no_cuda(torch.version.cuda, stack.list_gpus())
        if reason:
            return [Finding("GPU", "fail", f"CUDA build: {cuda}", reason)]
        return [Finding("GPU", "ok", f"none found; stages run on the CPU (CUDA build: {cuda})")]
    return [_gpu(index, cuda) for index in range(torch.cuda.device_count())]


def _gpu(index: int, cuda: str) -> Finding:
    import torch

    title, name = f"GPU cuda:{index}", torch.cuda.get_device_name(index)
    capability = torch.cuda.get_device_capability(index)
    if not is_supported(capability, torch.cuda.get_arch_list()):
        return Finding(title, "fail", _mismatch(name, capability), _other_stack(capability))
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info(index))
    detail = (
        f"{name}, sm_{capability[0]}{capability[1]}, CUDA {cuda}, {free:.1f} of {total:.1f} GB free"
    )
    if free < ROOM_GB:
        return Finding(title, "warn", detail, "end other work on it or lower the batch sizes")
    return Finding(title, "ok", detail)


def _triton() -> Finding:
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, OSError) as error:
        return Finding("Triton", "warn", f"{error}", "pip install triton==3.7.1 (optional)")
    if release(version) < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return Finding("Triton", "ok", f"{version}; not used: kernels need {wanted} (torch 2.8)")
    if _oldest_gpu() < TRITON_CAPABILITY:
        return Finding("Triton", "ok", f"{version}; not used: it needs compute capability 7.0")
    return Finding("Triton", "ok", version)


def _oldest_gpu() -> Capability:
    """Compute capability; that of the newest conceivable where there is none."""
    try:
        import torch
    except (ImportError, OSError):
        return (99, 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min((torch.cuda.get_device_capability(i) for i in range(count)), default=(99, 0))


def _memory() -> Finding:
    available = _available_memory_gb()
    if available is None:
        return Finding("memory", "ok", "amount not known on this system")
    detail = f"{available:.1f} GB available"
    if available < ROOM_GB:
        return Finding("memory", "warn", detail, "set data.cache to disk and lower the batch sizes")
    return Finding("memory", "ok", detail)


def _available_memory_gb() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) / 1e6 if match else None


def _disk(folder: Path) -> Finding:
    existing = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    free = shutil.disk_usage(existing).free / 1e9
    detail = f"{free:.1f} GB free for the cache in {folder}"
    if free < ROOM_GB:
        return Finding("disk", "warn", detail, "set data.cache_dir to a folder with more room")
    return Finding("disk", "ok", detail)


def _extra(package: str, extra: str, purpose: str) -> Finding:
    try:
        return Finding(package, "ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        remedy = f"pip install 'lgcnet_fast[{extra}]'"
        return Finding(package, "warn", f"not installed; needed for {purpose}", remedy)

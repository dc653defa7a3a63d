"""What keeps a backend from a device: the library, the GPU or its compute capability."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from functools import cache

import torch

from lgcnet_fast.doctor import OLDEST_TRITON, TRITON_CAPABILITY, release


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, device: torch.device) -> str | None:
    """Why `triton`, `cuda` or `reference` cannot serve tensors on `device`; None if it can."""
    if backend == "triton":
        return _why_not_triton(device)
    return _why_not_cuda(device) if backend == "cuda" else None


def _why_not_triton(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        return _outdated() or _too_old(device) or _no_compiler()
    if device.type == "cpu" and is_interpreted():
        return None
    return f"it needs an NVIDIA GPU, the device is {device}"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _outdated() -> str | None:
    version = importlib.metadata.version("triton")
    if release(version) >= OLDEST_TRITON:
        return None
    wanted = ".".join(map(str, OLDEST_TRITON))
    return f"triton {version} cannot compile all kernels, {wanted} can (it comes with torch 2.8)"


@cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= TRITON_CAPABILITY:
        return None
    wanted, given = (f"sm_{major}{minor}" for major, minor in (TRITON_CAPABILITY, capability))
    return f"triton needs {wanted} or later, {torch.cuda.get_device_name(device)} is {given}"


@cache
def _no_compiler() -> str | None:
    """Triton compiles the launchers of its kernels by the C compiler that it finds like this."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "triton needs a C compiler (install gcc, or name one in CC)"


def _why_not_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, the device is {device}"
    from lgcnet_fast.native.loader import available

    reasons = available()
    if None in reasons.values():
        return None
    return "; ".join(f"{route}: {reason}" for route, reason in reasons.items())

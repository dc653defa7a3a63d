"""Which torch runs on which NVIDIA GPU. Used before torch is installed: standard library only."""

import re
import subprocess
from typing import NamedTuple

WITHOUT_GPU = ("torch==2.13.0", "triton==3.7.1")
CUDA_13 = ("torch==2.13.0", "triton==3.7.1", "cupy-cuda13x>=14,<15")
CUDA_12 = ("torch==2.8.0", "cupy-cuda12x>=14,<15")
PASCAL = ("torch==2.7.1", "cupy-cuda12x>=14,<15")
"""The last release whose wheels hold code for GPUs below compute capability 7.0."""

CUDA_13_CAPABILITY = (7, 5)
CUDA_12_CAPABILITY = (7, 0)
DRIVERS = {11: 450, 12: 525, 13: 580}
"""First driver branch that runs each major CUDA version."""

QUERY = ("nvidia-smi", "--query-gpu=compute_cap,driver_version,name", "--format=csv,noheader")


class Gpu(NamedTuple):
    capability: tuple[int, int]
    driver: int
    """Driver branch: the number before the first dot."""
    name: str


class Listing(NamedTuple):
    """What nvidia-smi answers: the GPUs, or why it lists none (empty where it is not installed)."""

    gpus: tuple[Gpu, ...]
    complaint: str = ""


def list_gpus() -> Listing:
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return Listing(())
    except (OSError, subprocess.TimeoutExpired) as error:
        return Listing((), str(error))
    gpus = parse_gpus(answer.stdout)
    return Listing(gpus) if gpus else Listing((), (answer.stdout + answer.stderr).strip())


def parse_gpus(answer: str) -> tuple[Gpu, ...]:
    """From lines such as `8.6, 550.54.14, NVIDIA RTX A4000`; other lines are left out."""
    lines = re.findall(r"^\s*(\d+)\.(\d+)\s*,\s*(\d+)[^,\n]*,\s*(.+?)\s*$", answer, re.MULTILINE)
    return tuple(
        Gpu((int(major), int(minor)), int(driver), name) for major, minor, driver, name in lines
    )


def requirements(gpus: tuple[Gpu, ...]) -> tuple[str, ...]:
    """What pip should install first; follows the oldest GPU and its driver."""
    if not gpus:
        return WITHOUT_GPU
    return stack_for(min(gpu.capability for gpu in gpus), min(gpu.driver for gpu in gpus))


def stack_for(capability: tuple[int, int], driver: int | None = None) -> tuple[str, ...]:
    """pip requirements for one compute capability; without `driver`, for an up-to-date one."""
    if capability < CUDA_12_CAPABILITY:
        return PASCAL
    if capability < CUDA_13_CAPABILITY or (driver is not None and driver < DRIVERS[13]):
        return CUDA_12
    return CUDA_13


def install_command(stack: tuple[str, ...]) -> str:
    return "pip install " + " ".join(f"'{requirement}'" for requirement in stack)

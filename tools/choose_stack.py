"""Prints the pip requirements of the torch stack that runs on this machine's GPU, or without one.

Runs before anything is installed: standard library only. The choice follows the oldest GPU that
nvidia-smi lists and its driver.
"""

import re
import subprocess
import sys
from typing import NamedTuple

WITHOUT_GPU = ("torch==2.13.0", "triton==3.7.1")
CUDA_13 = ("torch==2.13.0", "triton==3.7.1", "cupy-cuda13x>=14,<15")
CUDA_12 = ("torch==2.8.0", "cupy-cuda12x>=14,<15")
PASCAL = ("torch==2.7.1", "cupy-cuda12x>=14,<15")
"""The last release whose wheels hold code for GPUs below compute capability 7.0."""

CUDA_13_CAPABILITY = (7, 5)
CUDA_12_CAPABILITY = (7, 0)
CUDA_13_DRIVER = 580
"""First driver branch that runs CUDA 13."""

QUERY = ("nvidia-smi", "--query-gpu=compute_cap,driver_version", "--format=csv,noheader")


class Gpu(NamedTuple):
    capability: tuple[int, int]
    driver: int
    """Driver branch: the number before the first dot."""


def read_gpus() -> list[Gpu]:
    """Every GPU that nvidia-smi lists; none where there is no working nvidia-smi."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(answer.stdout) if answer.returncode == 0 else []


def parse_gpus(answer: str) -> list[Gpu]:
    """From lines such as `8.6, 550.54.14`; lines without a capability are left out."""
    lines = re.findall(r"^\s*(\d+)\.(\d+)\s*,\s*(\d+)", answer, flags=re.MULTILINE)
    return [Gpu((int(major), int(minor)), int(driver)) for major, minor, driver in lines]


def requirements(gpus: list[Gpu]) -> tuple[str, ...]:
    """What pip should install first."""
    if not gpus:
        return WITHOUT_GPU
    oldest = min(gpu.capability for gpu in gpus)
    driver = min(gpu.driver for gpu in gpus)
    if oldest < CUDA_12_CAPABILITY:
        return PASCAL
    if oldest < CUDA_13_CAPABILITY or driver < CUDA_13_DRIVER:
        return CUDA_12
    return CUDA_13


def main() -> None:
    gpus = read_gpus()
    chosen = requirements(gpus)
    found = ", ".join(f"sm_{major}{minor}" for (major, minor), _ in gpus) or "no GPU"
    print(f"{found}: {' '.join(chosen)}", file=sys.stderr)
    print(" ".join(chosen))


if __name__ == "__main__":
    main()

"""A process that compiles Triton kernels into the cache on disk, without touching a GPU.

`python -m lgcnet_fast.ops.compile_worker` reads lines of JSON: the target as [backend, arch,
warp_size], then kernels as compile_ahead.py notes them. Exit code 1 if one could not be compiled.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget


class CompilingDriver:
    """All that Triton asks of a driver when it compiles for a GPU that may be elsewhere."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def main() -> int:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    first, *kernels = sys.stdin.read().splitlines()
    driver.set_active(CompilingDriver(GPUTarget(*json.loads(first))))
    return int(not all([_compiled(**json.loads(kernel)) for kernel in kernels]))


def _compiled(module: str, name: str, data: str) -> bool:
    """Whether the kernel, and what launches it, are on disk now."""
    from triton.backends.nvidia import driver as nvidia

    try:
        kernel: Any = getattr(importlib.import_module(module), name).preload(data)
        # Until Triton 3.6 a C compiler makes a launcher for every signature.
        if hasattr(nvidia, "make_launcher"):
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(f"{module}.{name}: {type(error).__name__}: {lines[-1]}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

"""A process that compiles Triton kernels into the cache on disk, without touching a GPU.

`python -m lgcnet_fast.ops.compile_worker` reads lines of JSON: the target as [backend, arch,
warp_size], then kernels as compile_ahead.py notes them, and answers each with a line: `DONE`, or
something else where the kernel could not be compiled. Processes of a pool call `start` with the
target, then `compiled` with each kernel.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

DONE = "done"


class CompilingDriver:
    """All that Triton asks of a driver when it compiles for a GPU that may be elsewhere."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def main() -> None:
    answers = sys.stdout
    # What compilers print is no answer.
    sys.stdout = sys.stderr
    start(json.loads(sys.stdin.readline()))
    print(DONE, file=answers, flush=True)
    for kernel in sys.stdin:
        print(DONE if compiled(kernel) else "failed", file=answers, flush=True)


def start(target: Sequence[Any]) -> None:
    """Compiles for this (backend, arch, warp_size) from now on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(CompilingDriver(GPUTarget(*target)))


def compiled(kernel: str) -> bool:
    """Whether the kernel of a line, and what launches it, are on disk now."""
    return _compiled(**json.loads(kernel))


def _compiled(module: str, name: str, data: str) -> bool:
    from triton.backends.nvidia import driver as nvidia

    from lgcnet_fast.kernels.cache_keys import settle_key

    try:
        function: Any = getattr(importlib.import_module(module), name)
        settle_key(function)
        kernel = function.preload(data)
        # Until Triton 3.6 a C compiler makes a launcher for every signature.
        if hasattr(nvidia, "make_launcher"):
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(f"{module}.{name}: {type(error).__name__}: {lines[-1]}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    main()

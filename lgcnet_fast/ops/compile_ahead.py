"""Compiling Triton kernels before they are launched, on all cores at once.

Triton compiles a kernel when it is launched for the first time, so one after another: more than a
hundred for a training step, minutes on one core. `compile_ahead` runs a rehearsal of what will be
launched, in which kernels that are not compiled yet are noted instead. Processes then compile them
(see compile_worker.py) into Triton's cache on disk, where the launches find them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from lgcnet_fast.ops.availability import is_interpreted
from lgcnet_fast.parallel import cores

log = logging.getLogger(__name__)

COLD_SECONDS = 0.1
"""A kernel that takes longer was compiled: from Triton's cache it comes in a tenth of that."""
KERNELS_A_PROCESS = 4
"""A process takes as long to start as it takes to compile so many."""


def compile_ahead(rehearsal: Callable[[], object]) -> None:
    """Compiles what `rehearsal` would launch first; on disk, for this process and later ones.

    The rehearsal runs on the GPU, but what it computes is garbage as soon as a kernel was left out:
    it must work on copies, or on what is written again. Where everything is on disk already,
    nothing is left out. Does nothing without Triton, in its interpreter, and before Triton 3.4,
    which cannot tell what it compiles.
    """
    if is_interpreted() or importlib.util.find_spec("triton") is None:
        return
    try:
        from triton import knobs
    except ImportError:
        return
    notes = _Notes()
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = notes.before
        knobs.runtime.jit_post_compile_hook = notes.after
        rehearsal()
    if notes.kernels:
        compile_together(list(notes.kernels))


class _Notes:
    """Triton's hooks: lets it compile until that takes time, then takes notes instead."""

    def __init__(self) -> None:
        self.kernels: dict[str, None] = {}
        """As lines of JSON for compile_worker.py, in order."""
        self._cold = False
        self._started = False
        self._begun = 0.0

    def before(self, *, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        """Whether Triton shall neither compile nor launch the kernel."""
        if self._cold:
            kernel = {"module": fn.module, "name": fn.name, "data": compile["specialization_data"]}
            self.kernels[json.dumps(kernel)] = None
        self._begun = time.perf_counter()
        return self._cold

    def after(self, **others: Any) -> None:
        # The first kernel also waits until Triton has started up.
        self._cold = self._started and time.perf_counter() - self._begun > COLD_SECONDS
        self._started = True


def compile_together(kernels: list[str]) -> None:
    """Compiles kernels for the current GPU, in as many processes as pay."""
    from triton.runtime import driver

    target = driver.active.get_current_target()
    count = min(cores(), -(-len(kernels) // KERNELS_A_PROCESS))
    log.info("compiling %d kernels in %d processes", len(kernels), count)
    # Those with the most arguments take longest.
    kernels = sorted(kernels, key=len, reverse=True)
    first = json.dumps([target.backend, target.arch, target.warp_size])
    processes = [_start("\n".join([first, *kernels[i::count]]) + "\n") for i in range(count)]
    failed = [process for process in processes if process.wait() != 0]
    if failed:
        log.warning(
            "%d of %d processes that compile kernels ahead failed: "
            "what is missing is compiled at its first launch, one kernel after another",
            len(failed),
            count,
        )


def _start(kernels: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "lgcnet_fast.ops.compile_worker"],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdin is not None
    process.stdin.write(kernels)
    process.stdin.close()
    return process

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lgcnet_fast.ops.availability import is_interpreted
from lgcnet_fast.parallel import cores

log = logging.getLogger(__name__)

KERNELS_A_PROCESS = 4
"""A process takes as long to start as it takes to compile so many."""
_in_turn: ContextVar[bool] = ContextVar("one_after_another", default=False)


def compile_ahead(rehearsal: Callable[[], object]) -> None:
    """Compiles what `rehearsal` would launch first; on disk, for this process and later ones.

    The rehearsal runs on the GPU, but what it computes is garbage as soon as a kernel was left out:
    it must work on copies, or on what is written again. Where everything is on disk already,
    nothing is left out. Does nothing without Triton, in its interpreter, before Triton 3.4,
    which cannot tell what it compiles, and `one_after_another`.
    """
    if _in_turn.get() or is_interpreted() or importlib.util.find_spec("triton") is None:
        return
    try:
        from triton import knobs
    except ImportError:
        return
    notes = _Notes()
    with knobs.runtime.scope(), knobs.compilation.scope():
        knobs.runtime.jit_cache_hook = notes.before
        knobs.compilation.listener = notes.compiled
        rehearsal()
    if notes.kernels:
        compile_together(list(notes.kernels))


@contextmanager
def one_after_another() -> Iterator[None]:
    """Nothing is compiled ahead within the `with` block: for a process beside which others compile
    already, as many as there are cores.
    """
    token = _in_turn.set(True)
    try:
        yield
    finally:
        _in_turn.reset(token)


class _Notes:
    """Triton's hooks: lets it take kernels from its cache until one is missing, then takes notes.

    The one that was missing first has been compiled by then.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, None] = {}
        """As lines of JSON for compile_worker.py, in order."""
        self._cold = False

    def before(self, *, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        """Whether Triton shall neither compile nor launch the kernel."""
        if self._cold:
            kernel = {"module": fn.module, "name": fn.name, "data": compile["specialization_data"]}
            self.kernels[json.dumps(kernel)] = None
        return self._cold

    def compiled(self, *, cache_hit: bool, **others: Any) -> None:
        # How long it took would not tell: on a busy machine the cache takes its time as well.
        self._cold = self._cold or not cache_hit


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

"""Compiling Triton kernels before they are launched, on all cores at once.

Triton compiles a kernel when it is launched for the first time, so one after another: more than a
hundred for a training step, minutes on one core. `compile_ahead` runs a rehearsal of what will be
launched, in which kernels that are not compiled yet are noted instead. Processes then compile them
(see compile_worker.py) into Triton's cache on disk, where the launches find them. `compile_all`
does so for many rehearsals, of which processes compile what is noted while the next one runs.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from lgcnet_fast.ops.availability import is_interpreted
from lgcnet_fast.parallel import Enough, all_of_them, cores, process_pool

log = logging.getLogger(__name__)

KERNELS_A_PROCESS = 4
"""A process takes as long to start as it takes to compile so many."""
PATIENCE = 1.0
"""Seconds between two looks whether enough is compiled."""
_in_turn: ContextVar[bool] = ContextVar("one_after_another", default=False)
Item = TypeVar("Item")


def compile_ahead(rehearsal: Callable[[], object]) -> None:
    """Compiles what `rehearsal` would launch first; on disk, for this process and later ones.

    The rehearsal runs on the GPU, but what it computes is garbage as soon as a kernel was left out:
    it must work on copies, or on what is written again. Where everything is on disk already,
    nothing is left out. Does nothing without Triton, in its interpreter, before Triton 3.4,
    which cannot tell what it compiles, and `one_after_another`.
    """
    if _in_turn.get() or not can_take_notes():
        return
    notes = _Notes()
    with notes.of_launches():
        rehearsal()
    if notes.kernels:
        compile_together(list(notes.kernels))


def can_take_notes() -> bool:
    """Whether Triton is there, compiles, and tells what."""
    if is_interpreted() or importlib.util.find_spec("triton") is None:
        return False
    return importlib.util.find_spec("triton.knobs") is not None


def compile_all(
    rehearse: Callable[[Item], object],
    items: Sequence[Item],
    progress: Callable[[int, int], None] = lambda done, total: None,
    enough: Enough = all_of_them,
) -> int:
    """Compiles what `rehearse` would launch for each item, equal kernels once.

    What was not launched in this process before is not launched either, so a rehearsal computes
    garbage. Returns how many of the items, from the first on, have their kernels on disk when all
    have, or when this is `enough`. `progress` is called with this number, as it grows, and that of
    all. Only where notes can be taken. Raises `DeviceError` if a process dies.
    """
    from triton.runtime import driver

    from lgcnet_fast.ops import compile_worker

    target = driver.active.get_current_target()
    notes, ready = _Notes(cold=True), 0
    compiling: list[list[Future[bool]]] = []
    arguments = ((target.backend, target.arch, target.warp_size),)
    with process_pool(cores(), compile_worker.start, arguments) as pool:
        while ready < len(items) and not enough(ready):
            if len(compiling) < len(items):
                known = len(notes.kernels)
                with notes.of_launches():
                    rehearse(items[len(compiling)])
                new = list(notes.kernels)[known:]
                compiling.append([pool.submit(compile_worker.compiled, kernel) for kernel in new])
            else:
                wait(compiling[ready], PATIENCE)
            while ready < len(compiling) and all(kernel.done() for kernel in compiling[ready]):
                failed = sum(not kernel.result() for kernel in compiling[ready])
                if failed:
                    log.warning("kernels left to their first launch: %d", failed)
                ready += 1
                progress(ready, len(items))
    return ready


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

    The one that was missing first has been compiled by then. cold: takes notes from the start.
    """

    def __init__(self, cold: bool = False) -> None:
        self.kernels: dict[str, None] = {}
        """As lines of JSON for compile_worker.py, in order."""
        self._cold = cold

    @contextmanager
    def of_launches(self) -> Iterator[None]:
        """Of those within the `with` block."""
        from triton import knobs

        with knobs.runtime.scope(), knobs.compilation.scope():
            knobs.runtime.jit_cache_hook = self.before
            knobs.compilation.listener = self.compiled
            yield

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

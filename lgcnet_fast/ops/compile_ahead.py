"""Compiling Triton kernels before they are launched, on all cores at once.

Triton compiles a kernel when it is launched for the first time, so one after another: more than a
hundred for a training step, minutes on one core. `compile_ahead` runs a rehearsal of what will be
launched, in which kernels that are not compiled yet are noted instead. Processes (see
compile_worker.py) compile them meanwhile into Triton's cache on disk, where the launches find them.
`compile_all` does so for many rehearsals.
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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import Empty, PriorityQueue
from threading import Thread
from typing import Any, TypeVar

from lgcnet_fast.ops.availability import is_interpreted
from lgcnet_fast.ops.compile_worker import DONE
from lgcnet_fast.parallel import Enough, all_of_them, cores, process_pool

log = logging.getLogger(__name__)

KERNELS_A_PROCESS = 4
"""A process takes as long to start as it takes to compile so many."""
PATIENCE = 1.0
"""Seconds between two looks whether enough is compiled."""
LEFT = "kernels left to their first launch: %d"
END = (1, "")
"""Behind every kernel in the queue of those that wait."""
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
    with _Compilers() as compilers:
        notes = _Notes(found=compilers.add)
        with notes.of_launches():
            rehearsal()
        if notes.kernels:
            log.info("compiling %d kernels in %d processes", len(notes.kernels), len(compilers))
        failed = compilers.finish()
    if failed:
        log.warning(LEFT, failed)


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
                    log.warning(LEFT, failed)
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

    def __init__(
        self, cold: bool = False, found: Callable[[str], object] = lambda kernel: None
    ) -> None:
        self.kernels: dict[str, None] = {}
        """As lines of JSON for compile_worker.py, in order."""
        self._cold, self._found = cold, found

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
            about = {"module": fn.module, "name": fn.name, "data": compile["specialization_data"]}
            kernel = json.dumps(about)
            if kernel not in self.kernels:
                self.kernels[kernel] = None
                self._found(kernel)
        return self._cold

    def compiled(self, *, cache_hit: bool, **others: Any) -> None:
        # How long it took would not tell: on a busy machine the cache takes its time as well.
        self._cold = self._cold or not cache_hit


class _Compilers:
    """Processes that compile kernels for the current GPU, as many as pay for what is added."""

    def __init__(self) -> None:
        self._waiting: PriorityQueue[tuple[int, str]] = PriorityQueue()
        self._added = 0
        self._compiled: list[str] = []
        self._threads: list[Thread] = []

    def __len__(self) -> int:
        return len(self._threads)

    def __enter__(self) -> _Compilers:
        return self

    def __exit__(self, *exception: object) -> None:
        """What no process has begun is left."""
        with suppress(Empty):
            while True:
                self._waiting.get_nowait()
        self.finish()

    def add(self, kernel: str) -> None:
        # Those with the most arguments take longest, and are taken first.
        self._waiting.put((-len(kernel), kernel))
        self._added += 1
        if len(self) < min(cores(), -(-self._added // KERNELS_A_PROCESS)):
            self._threads.append(Thread(target=self._compile, args=(_target(),)))
            self._threads[-1].start()

    def finish(self) -> int:
        """Waits until the processes are done; how many kernels are not compiled."""
        for _ in self._threads:
            self._waiting.put(END)
        for thread in self._threads:
            thread.join()
        return self._added - len(self._compiled)

    def _compile(self, target: str) -> None:
        """One process, until nothing is left or it dies."""
        with _worker() as process:
            answer = _ask(process, target)
            while answer and (kernel := self._waiting.get()[1]):
                answer = _ask(process, kernel)
                if answer == DONE:
                    self._compiled.append(kernel)


def _target() -> str:
    """The current GPU, as the first line for compile_worker.py."""
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return json.dumps([target.backend, target.arch, target.warp_size])


def _worker() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lgcnet_fast.ops.compile_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _ask(process: subprocess.Popen[str], line: str) -> str:
    """The answer of compile_worker.py; nothing if it has died."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()
    return ""

"""Work in threads: a map that keeps its order, and an iterator that runs ahead."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def worker_count() -> int:
    """Threads for decoding: the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(function: Callable[[int], T], count: int) -> Iterator[T]:
    """`function(0)`, `function(1)`, ... computed in threads, a bounded number ahead."""
    workers = worker_count()
    ahead: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for index in range(count):
            ahead.append(pool.submit(function, index))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The items, computed by a thread up to `depth` ahead.

    An exception in the thread is raised here, in its place; the thread ends when the caller stops
    early.
    """
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    stop = Event()

    def put(kind: str, value: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value  # type: ignore[misc]
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()

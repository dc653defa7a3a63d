"""Independent work of an operation side by side in a CUDA graph: every job on a stream of its own.

Kernels on small maps leave most of a GPU idle, and one stream runs them one after another. While a
graph is captured, `side_by_side` forks the current stream and joins it again, so that the graph
holds the jobs as parallel branches. Whoever calls it, autograd for one, sees the current stream
only. Elsewhere the jobs run one after another: launching is what takes the time there.

What makes this safe with torch's allocator, which reuses memory on the stream that it was
allocated on as soon as Python drops it, whatever other streams still do with it:

1. The caller launches nothing until `side_by_side` returns. It holds what the jobs read until then,
   so that none of that is freed while a job may still read it.
2. No job reads or writes what another one writes.
3. A stream belongs to one job at a time: a job that calls `side_by_side` shares out its own
   streams only. All of them have joined the job's first stream when it ends.
4. What a job drops that was there before it, it hands to `keep_until_joined`.
5. What a job for `later` reads is held until the current stream has waited for it.

So memory that a stream takes again was last used by that stream itself, or by one that has joined
the point from which the stream was forked since. `record_stream` is not needed, which would keep
memory until the capture ends. What a job returns may be used and dropped like any other tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
LANES = 5
"""Streams among which jobs are shared out, the current one included: cuBLAS takes a workspace on
each (see train/memory.py)."""

FIRST = -1
"""Priority of streams before those of jobs in the background and for later."""
TURNS = 2
"""So many `side_by_side` begin after one in which jobs were put off until these are waited for:
the fewer, the less memory is held."""

_own: ContextVar[tuple[torch.cuda.Stream, ...] | None] = ContextVar("lanes", default=None)
"""The streams of the job that is running, the one that it runs on first."""


class _Background(NamedTuple):
    stream: torch.cuda.Stream
    held: list[Callable[[], object]]


_background: ContextVar[_Background | None] = ContextVar("background", default=None)
_kept: ContextVar[list[Any] | None] = ContextVar("kept", default=None)
"""What jobs have dropped since the outermost `side_by_side` began."""


class _Later:
    """Jobs on a stream of their own, beside all that follows."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._held: list[object] = []
        """For the jobs since the last turn: themselves and what they have dropped."""
        self._turns: deque[tuple[torch.cuda.Event, list[object]]] = deque()
        self._owners: set[int] = set()
        self.pending: list[Callable[[], None]] = []
        """For the next `side_by_side`."""

    def run(self, job: Callable[[], T], current: torch.cuda.Stream) -> T:
        self._stream.wait_stream(current)
        self._held.append(job)
        kept = _kept.set(self._held)
        try:
            return _run(job, (self._stream,))
        finally:
            _kept.reset(kept)

    def turn(self, current: torch.cuda.Stream) -> None:
        """Where nothing but `current` and the jobs run: lets go of what early ones have read."""
        if self._held:
            self._turns.append((self._stream.record_event(), self._held))
            self._held = []
        if len(self._turns) > TURNS:
            done, _ = self._turns.popleft()
            current.wait_event(done)

    def must_wait(self, owners: Sequence[int] | None) -> bool:
        """Also for a weight that comes again, since autograd adds its gradients up."""
        known = owners is None or not self._owners.isdisjoint(owners)
        self._owners.update(owners or ())
        return known

    def join(self, current: torch.cuda.Stream) -> None:
        self.until_now()(current)

    def until_now(self) -> Callable[[torch.cuda.Stream], None]:
        """Makes a stream wait for the jobs that there are by now."""
        if not (self._held or self._turns):  # The stream may have no part in a capture.
            return lambda current: None
        done = self._stream.record_event()
        return lambda current: current.wait_event(done)


_later: dict[torch.device, _Later] = {}
"""Of the `gradients_later` blocks; backward passes run in other threads, which share it."""


def side_by_side(
    device: torch.device,
    jobs: Sequence[Callable[[], T]],
    later: Sequence[Callable[[], T]] = (),
) -> list[T]:
    """What the jobs return, in order, and those for `later` after them.

    They work on `device`, as the module's rules say. Where there are more jobs than streams, some
    jobs follow each other on a stream. Those for later give gradients of weights, which nobody
    reads in a `gradients_later` block without `settle`: there they run beside all that follows.
    """
    streams = _own.get() or _streams(device)
    beside = _later.get(device) if streams else None
    if beside is None:
        return _forked(streams, [*jobs, *later])
    pending: list[Callable[[], None]] = []
    if _own.get() is None:
        beside.turn(streams[0])
        pending, beside.pending = beside.pending, []
    put_off = [beside.run(job, streams[0]) for job in later]
    # Those last: autograd goes back through a job on the streams of its forward pass.
    results: list[Any] = _forked(streams, [*jobs, *pending])
    return results[: len(jobs)] + put_off


def _forked(streams: Sequence[torch.cuda.Stream], jobs: Sequence[Callable[[], T]]) -> list[T]:
    lanes = min(len(streams), len(jobs))
    if lanes < 2:
        return [job() for job in jobs]
    shares = [streams[lane::lanes] for lane in range(lanes)]
    fork = streams[0].record_event()
    for share in shares[1:]:
        share[0].wait_event(fork)
    outermost = _kept.set([]) if _kept.get() is None else None
    try:
        results = [_run(job, shares[index % lanes]) for index, job in enumerate(jobs)]
        for share in shares[1:]:
            streams[0].wait_stream(share[0])
        return results
    finally:
        if outermost is not None:
            _kept.reset(outermost)


def lanes_of(device: torch.device) -> int:
    """How many jobs `side_by_side` would run on streams of their own, at most; at least 1."""
    return len(_own.get() or _streams(device)) or 1


@contextmanager
def gradients_later(device: torch.device) -> Iterator[None]:
    """Around a backward pass whose gradients of weights are read only after the `with` block.

    So none of the weights has a gradient yet, to which autograd would add.
    """
    if not _streams(device):
        yield
        return
    beside = _later[device] = _Later(device)
    try:
        yield
    finally:
        del _later[device]
    beside.join(torch.cuda.current_stream(device))
    for job in beside.pending:
        job()


def settle(device: torch.device, owners: Sequence[int] | None = None) -> None:
    """Before gradients of weights, of which some came from jobs for later, are read.

    owners: addresses of the weights where they only go to autograd, which reads them if it adds
    them to others of the same weight: there this waits for the second ones.
    """
    beside = _later.get(device)
    if beside is not None and beside.must_wait(owners):
        beside.join(torch.cuda.current_stream(device))


def beside_next(device: torch.device, job: Callable[[], None]) -> None:
    """Runs a job, which may read gradients of weights that jobs for later have made by now.

    In a `gradients_later` block it runs beside the jobs of the next `side_by_side`, or else at the
    end of the block, until which nobody needs what it writes; until it has run, what it reads is
    held. Elsewhere it runs at once.
    """
    beside = _later.get(device)
    if beside is None or _own.get() is not None:
        settle(device)
        job()
        return
    wait = beside.until_now()

    def put_off() -> None:
        wait(torch.cuda.current_stream(device))
        job()

    beside.pending.append(put_off)


@contextmanager
def background(device: torch.device) -> Iterator[None]:
    """Within the `with` block, which a capture holds, `in_background` has a stream of its own."""
    beside = _Background(torch.cuda.Stream(device), [])
    token = _background.set(beside)
    try:
        yield
    finally:
        _background.reset(token)
    if beside.held:  # Else the stream has no part in the capture, which must not wait for it.
        torch.cuda.current_stream(device).wait_stream(beside.stream)


def in_background(device: torch.device, job: Callable[[], object]) -> None:
    """Runs a job beside all that follows in the `background` block, elsewhere at once.

    Nobody needs what it writes, or changes what it reads, before the end of the block; until then
    it is held.
    """
    beside = _background.get()
    if beside is None or _own.get() is not None:
        job()
        return
    beside.held.append(job)
    beside.stream.wait_stream(torch.cuda.current_stream(device))
    _run(job, (beside.stream,))


def keep_until_joined(*tensors: torch.Tensor) -> None:
    """For a job that drops tensors which it has not allocated; elsewhere they are just dropped."""
    kept = _kept.get()
    if kept is not None:
        kept.extend(tensors)


def _run(job: Callable[[], T], streams: tuple[torch.cuda.Stream, ...]) -> T:
    token = _own.set(streams)
    try:
        with torch.cuda.stream(streams[0]):
            return job()
    finally:
        _own.reset(token)


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """The current stream and those beside it; none unless a graph is captured."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return ()
    beside = _side_streams(device)
    if not torch.cuda.is_current_stream_capturing():
        return ()
    current = torch.cuda.current_stream(device)
    # Torch hands out streams from a pool, so that the current one may be among them.
    return current, *(stream for stream in beside if stream != current)


@cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """Made by the first call, which comes before any capture."""
    return tuple(torch.cuda.Stream(device, priority=FIRST) for _ in range(LANES - 1))

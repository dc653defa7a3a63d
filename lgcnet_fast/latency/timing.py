"""The one way in which frames are timed: rounds in which all subjects take turns.

A frame is a function that runs one batch on a device; it may return before the device is done.
Every round measures every subject twice:

- throughput: frames are queued back to back between two synchronisations, as the paper does;
- latency: each frame is waited for, as an application with one camera does. The clock is the
  host's, from the call to the end of the synchronisation behind it.

Odd rounds take the subjects in the opposite order, so that a clock that drifts, or what the
subject before has left in the caches, favours none of them. Garbage collection waits meanwhile.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lgcnet_fast.latency.measure import median_interval

Frame = Callable[[], object]
"""Runs one batch."""


@dataclass(frozen=True)
class Protocol:
    """How much is measured; the defaults take about five seconds a subject."""

    rounds: int = 12
    warm_up_seconds: float = 1.0
    """Of every subject, before the first round."""
    warm_up_frames: int = 5
    """At least."""
    block_seconds: float = 0.25
    """What is queued between two synchronisations."""
    single_frames: int = 50
    """Frames of a round that are waited for one by one."""


FULL_PROTOCOL = Protocol()


@dataclass(frozen=True)
class Timing:
    """Of one subject. A frame holds `batch` images."""

    batch: int
    fps: float
    """Images a second, back to back: the median over the rounds."""
    fps_spread: float
    """Half the width of that median's 95 % interval, by the median."""
    latency_ms: float
    """Median time of one frame that is waited for."""
    latency_p99_ms: float
    host_us: float | None
    """Median time until the call for a frame returns; none on the CPU, where that is all of it."""
    frames: int
    """That counted, in both measurements."""
    round_fps: tuple[float, ...]
    """Round by round, to compare subjects within rounds."""

    @property
    def frame_ms(self) -> float:
        """Milliseconds a frame, back to back."""
        return 1e3 * self.batch / self.fps


def time_interleaved(
    subjects: Mapping[str, Frame],
    device: torch.device,
    batch: int = 1,
    protocol: Protocol = FULL_PROTOCOL,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Timings of all subjects by name, measured in turns on `device`.

    batch: images a frame. `progress` is called with the rounds done and the number of rounds.
    """
    stopwatch = _Stopwatch(device)
    gc.collect()
    with _without_garbage_collection():
        records = {
            name: _Record(_frames_a_block(frame, stopwatch, protocol))
            for name, frame in subjects.items()
        }
        for number in range(protocol.rounds):
            for name in _in_turn(list(subjects), number):
                _measure_round(subjects[name], records[name], stopwatch, protocol)
            if progress is not None:
                progress(number + 1, protocol.rounds)
    return {name: record.timing(device, batch) for name, record in records.items()}


def back_to_back_ms(
    frame: Frame, device: torch.device, blocks: int = 5, block_seconds: float = 0.01
) -> float:
    """Milliseconds a frame: the median of a few short blocks, for networks measured by hundreds.

    Collecting the garbage of those before takes as long as all blocks, and is left to the caller.
    """
    stopwatch = _Stopwatch(device)
    brief = Protocol(warm_up_seconds=block_seconds, block_seconds=block_seconds, warm_up_frames=2)
    with _without_garbage_collection():
        count = _frames_a_block(frame, stopwatch, brief)
        return 1e3 * statistics.median(stopwatch.block(frame, count) for _ in range(blocks)) / count


@dataclass
class _Record:
    """What the rounds of one subject have given so far, in seconds."""

    frames_a_block: int
    blocks: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)

    def timing(self, device: torch.device, batch: int) -> Timing:
        rates = [batch * self.frames_a_block / seconds for seconds in self.blocks]
        fps, spread = median_interval(rates)
        return Timing(
            batch=batch,
            fps=fps,
            fps_spread=spread,
            latency_ms=1e3 * statistics.median(self.waited),
            latency_p99_ms=1e3 * percentile(self.waited, 0.99),
            host_us=1e6 * statistics.median(self.returned) if device.type == "cuda" else None,
            frames=len(self.waited) + len(self.blocks) * self.frames_a_block,
            round_fps=tuple(rates),
        )


class _Stopwatch:
    """Wall clock around work on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def block(self, frame: Frame, count: int) -> float:
        """Seconds of `count` frames back to back."""
        self.wait()
        started = time.perf_counter()
        for _ in range(count):
            frame()
        self.wait()
        return time.perf_counter() - started

    def single(self, frame: Frame) -> tuple[float, float]:
        """Seconds until the call returns, and until the frame is done."""
        self.wait()
        started = time.perf_counter()
        frame()
        returned = time.perf_counter()
        self.wait()
        return returned - started, time.perf_counter() - started


def _frames_a_block(frame: Frame, stopwatch: _Stopwatch, protocol: Protocol) -> int:
    """Warms up; how many frames then fill a block."""
    stopwatch.block(frame, protocol.warm_up_frames)
    seconds, count = stopwatch.block(frame, 3), 3
    while seconds < protocol.warm_up_seconds:
        seconds += stopwatch.block(frame, count)
        count *= 2
    last = stopwatch.block(frame, count)
    return max(1, round(protocol.block_seconds * count / last))


def _measure_round(
    frame: Frame, record: _Record, stopwatch: _Stopwatch, protocol: Protocol
) -> None:
    # Another subject ran before; its weights are in the caches.
    stopwatch.block(frame, 2)
    record.blocks.append(stopwatch.block(frame, record.frames_a_block))
    for _ in range(protocol.single_frames):
        returned, waited = stopwatch.single(frame)
        record.returned.append(returned)
        record.waited.append(waited)


def _in_turn(names: Sequence[str], number: int) -> Sequence[str]:
    return names[::-1] if number % 2 else names


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

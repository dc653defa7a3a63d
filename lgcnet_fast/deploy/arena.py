"""One arena for all maps of a plan: where they lie, and which launches may overlap in time.

Launches are put on a few streams. A launch waits for those whose results it reads and follows the
earlier ones of its stream; what follows from both is the order that can be relied on. Two buffers
may share memory only if every launch that touches the one is ordered before the launch that writes
the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lgcnet_fast.deploy.plan import Access, Buffer, Plan, dependencies

STREAMS = 4
"""Launches that overlap save 50 of 700 us of a frame on an H200, and cost the host nothing."""
ALIGNMENT = 256
"""Bytes; vector loads need 16."""


@dataclass(frozen=True)
class Schedule:
    """By launch: its stream, the launches that it waits for, and all that come before it."""

    streams: tuple[int, ...]
    waits: tuple[tuple[int, ...], ...]
    """On other streams, and as few as keep the order: each costs time when a graph starts."""
    before: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Arena:
    offsets: dict[Buffer, int]
    """In bytes."""
    size: int
    """In bytes."""


def schedule(launches: Sequence[Access], streams: int = STREAMS) -> Schedule:
    """Each launch goes behind a launch that it depends on, if that is the last of its stream."""
    last: list[int | None] = [None] * streams
    chosen: list[int] = []
    before: list[frozenset[int]] = []
    waits: list[tuple[int, ...]] = []
    for index, needed in enumerate(dependencies(launches)):
        ancestors = needed.union(*(before[launch] for launch in needed))
        stream = _stream_for(needed, ancestors, last)
        previous = last[stream]
        if previous is not None:
            ancestors = ancestors | {previous} | before[previous]
        last_ones = needed if previous is None else needed | {previous}
        implied = frozenset[int]().union(*(before[launch] for launch in last_ones))
        others = (at for at in needed - implied if chosen[at] != stream)
        waits.append(tuple(sorted(others)))
        before.append(frozenset(ancestors))
        chosen.append(stream)
        last[stream] = index
    return Schedule(tuple(chosen), tuple(waits), tuple(before))


def _stream_for(needed: set[int], ancestors: set[int], last: Sequence[int | None]) -> int:
    """Behind the newest dependency; else where nothing would be waited for in vain."""
    tails = {tail: stream for stream, tail in enumerate(last) if tail is not None}
    direct = [tail for tail in tails if tail in needed]
    if direct:
        return tails[max(direct)]
    idle = [stream for stream, tail in enumerate(last) if tail is None or tail in ancestors]
    return idle[0] if idle else tails[min(tails)]


def allocate(plan: Plan[Any], order: Schedule) -> Arena:
    """The largest buffers first, each at the lowest place that is free for all its life."""
    lives = {buffer: _life(plan.launches, buffer, plan.output) for buffer in plan.buffers()}
    sizes = {buffer: plan.bytes_of(buffer) for buffer in lives}
    offsets: dict[Buffer, int] = {}
    for buffer in sorted(lives, key=lambda b: -sizes[b]):
        rivals = [
            other for other in offsets if may_overlap(lives[buffer], lives[other], order.before)
        ]
        offsets[buffer] = _lowest_gap(
            sizes[buffer], sorted((offsets[other], sizes[other]) for other in rivals)
        )
    return Arena(offsets, max(offsets[b] + sizes[b] for b in offsets))


@dataclass(frozen=True)
class Life:
    """Launches that touch a buffer or slices of it: those that write it and those that read it."""

    writers: frozenset[int]
    touched: frozenset[int]


def _life(launches: Sequence[Access], buffer: Buffer, output: Buffer) -> Life:
    def touching(buffers: Sequence[Buffer]) -> bool:
        return any(one.memory is buffer for one in buffers)

    writers = frozenset(at for at, launch in enumerate(launches) if touching(launch.writes))
    readers = {at for at, launch in enumerate(launches) if touching(launch.reads)}
    if buffer is output.memory:
        # Read after the last launch, which nothing comes after.
        readers.add(len(launches))
    return Life(writers, writers | readers)


def may_overlap(one: Life, other: Life, before: Sequence[frozenset[int]]) -> bool:
    """Whether two buffers may hold something that is still needed at the same time."""
    one_first = all(one.touched <= before[writer] for writer in other.writers)
    other_first = all(other.touched <= before[writer] for writer in one.writers)
    return not (one_first or other_first)


def _lowest_gap(size: int, taken: Sequence[tuple[int, int]]) -> int:
    """taken: (offset, size), by offset; they may overlap each other."""
    offset = 0
    for start, length in taken:
        if offset + size <= start:
            break
        offset = max(offset, -(-(start + length) // ALIGNMENT) * ALIGNMENT)
    return offset

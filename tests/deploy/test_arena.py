"""Memory that is shared is never needed twice, whatever overlaps in time."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgcnet_fast.deploy.arena import ALIGNMENT, allocate, may_overlap, schedule
from lgcnet_fast.deploy.plan import Buffer, Plan, Term, Tile, dependencies
from tests.deploy.test_plan import reference_plan

BIAS = torch.zeros(8)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Random graphs of launches that each read some earlier maps."""
    launches: list[Tile] = []
    for index in range(draw(st.integers(1, 14))):
        earlier = st.sampled_from([launch.out for launch in launches]) if launches else st.nothing()
        sources = draw(st.lists(earlier, max_size=3, unique=True)) if launches else []
        out = Buffer(f"map{index}", draw(st.integers(1, 9)), draw(st.integers(1, 9)), 8)
        launches.append(Tile(out.name, [Term("copy", source) for source in sources], BIAS, out))
    return Plan((9, 9), 1, torch.float32, tuple(launches), launches[-1].out)


def ordered_pairs(plan: Plan, streams: int) -> set[tuple[int, int]]:
    """(earlier, later) for all pairs of launches, from the waits and the streams alone."""
    order = schedule(plan.launches, streams)
    edges = {(at, index) for index, waits in enumerate(order.waits) for at in waits}
    for stream in set(order.streams):
        members = [index for index, at in enumerate(order.streams) if at == stream]
        edges |= set(zip(members, members[1:], strict=False))
    closed = set(edges)
    for middle in range(len(plan.launches)):
        before = [a for a, b in closed if b == middle]
        after = [b for a, b in closed if a == middle]
        closed |= {(a, b) for a in before for b in after}
    return closed


def check(plan: Plan, streams: int) -> None:
    order = schedule(plan.launches, streams)
    arena = allocate(plan, order)
    pairs = ordered_pairs(plan, streams)
    for index, needed in enumerate(dependencies(plan.launches)):
        assert all((at, index) in pairs for at in needed)

    def touching(buffer: Buffer) -> list[int]:
        launches = enumerate(plan.launches)
        return [at for at, launch in launches if is_of(buffer, [*launch.reads, *launch.writes])]

    def free(one: Buffer, other: Buffer) -> bool:
        """Whether the one is needed no more when the other is first written."""
        writers = [at for at, launch in enumerate(plan.launches) if is_of(other, launch.writes)]
        before = all((at, writer) in pairs for at in touching(one) for writer in writers)
        return one is not plan.output and before

    for one, other in combinations(plan.buffers(), 2):
        (start, end), (begin, stop) = (
            (arena.offsets[b], arena.offsets[b] + plan.bytes_of(b)) for b in (one, other)
        )
        if end <= begin or stop <= start:
            continue
        assert free(one, other) or free(other, one), (one.name, other.name)
    for buffer, offset in arena.offsets.items():
        assert offset % ALIGNMENT == 0 and offset + plan.bytes_of(buffer) <= arena.size


def is_of(buffer: Buffer, touched: list[Buffer]) -> bool:
    """Whether the buffer or a slice of it is among them."""
    return any(one.memory is buffer for one in touched)


@settings(max_examples=150, deadline=None)
@given(plan=plans(), streams=st.integers(1, 4))
def test_shared_memory_is_never_needed_twice(plan: Plan, streams: int) -> None:
    check(plan, streams)


@pytest.mark.parametrize("streams", [1, 4])
def test_the_reference_network(streams: int) -> None:
    plan = reference_plan()
    check(plan, streams)
    order = schedule(plan.launches, streams)
    assert max(order.streams) < streams
    total = sum(plan.bytes_of(buffer) for buffer in plan.buffers())
    assert allocate(plan, order).size < total / 2


def test_a_map_and_its_reader_do_not_share() -> None:
    first, second = (Buffer(name, 4, 4, 8) for name in "ab")
    launches = (Tile("a", [], BIAS, first), Tile("b", [Term("copy", first)], BIAS, second))
    plan = Plan((4, 4), 1, torch.float32, launches, second)
    arena = allocate(plan, schedule(launches))
    assert sorted(arena.offsets.values()) == [0, 512]


def test_lives_that_follow_each_other_may_share() -> None:
    from lgcnet_fast.deploy.arena import Life

    before = [frozenset(), frozenset({0}), frozenset({0, 1})]
    last = Life(frozenset({2}), frozenset({2}))
    assert not may_overlap(Life(frozenset({0}), frozenset({0, 1})), last, before)
    assert may_overlap(Life(frozenset({0}), frozenset({0, 2})), last, before)
    # Slices are written one after another: the memory must be free for the first.
    slices = Life(frozenset({0, 2}), frozenset({0, 2}))
    assert may_overlap(Life(frozenset({1}), frozenset({1})), slices, before)


@settings(max_examples=50, deadline=None)
@given(plan=plans(), streams=st.integers(1, 4))
def test_no_launch_waits_for_what_comes_before_anyway(plan: Plan, streams: int) -> None:
    order = schedule(plan.launches, streams)
    for index, waits in enumerate(order.waits):
        earlier = [at for at in range(index) if order.streams[at] == order.streams[index]]
        implied = [order.before[at] for at in [*waits, *earlier]]
        assert not any(at in before for at in waits for before in implied)

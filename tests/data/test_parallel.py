from __future__ import annotations

import threading
import time

import pytest

from lgcnet_fast.data.parallel import ordered_map, prefetch


def test_order_is_kept():
    def slow_first(index: int) -> int:
        time.sleep(0.01 if index % 3 == 0 else 0)
        return index * index

    assert list(ordered_map(slow_first, 40)) == [i * i for i in range(40)]


def test_ordered_map_stops_at_an_exception():
    calls = []

    def fail(index: int) -> int:
        calls.append(index)
        if index == 2:
            raise ValueError("third")
        return index

    with pytest.raises(ValueError, match="third"):
        list(ordered_map(fail, 10_000))
    assert len(calls) < 1000


def test_prefetch_yields_everything_in_order():
    assert list(prefetch(iter(range(50)))) == list(range(50))
    assert list(prefetch([])) == []


def test_prefetch_runs_in_another_thread_and_ahead():
    made = []

    def items():
        for index in range(10):
            made.append(threading.current_thread())
            yield index

    iterator = prefetch(items(), depth=2)
    assert next(iterator) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert 3 <= len(made) <= 4
    assert threading.main_thread() not in made
    iterator.close()


def test_exceptions_surface_in_their_place():
    def items():
        yield 1
        raise KeyError("in the thread")

    iterator = prefetch(items())
    assert next(iterator) == 1
    with pytest.raises(KeyError, match="in the thread"):
        next(iterator)


def test_stopping_early_ends_the_thread():
    def endless():
        while True:
            yield bytes(1000)

    before = threading.active_count()
    for _ in range(3):
        iterator = prefetch(endless())
        next(iterator)
        iterator.close()
    assert threading.active_count() == before

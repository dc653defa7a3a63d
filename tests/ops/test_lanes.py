"""Jobs side by side: on streams that only remember their order, and in a real CUDA graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from lgcnet_fast.ops import lanes
from lgcnet_fast.ops.lanes import (
    LANES,
    TURNS,
    background,
    beside_next,
    gradients_later,
    in_background,
    keep_until_joined,
    settle,
    side_by_side,
)

ANYWHERE = torch.device("cpu")


class Stream:
    """Knows which launches are done before its next one."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done


class Device:
    """Streams, the current one, and what every launch came after."""

    def __init__(self) -> None:
        self.streams = tuple(Stream() for _ in range(LANES))
        self.current = self.streams[0]
        self.before: dict[str, set[str]] = {}
        self.stream_of: dict[str, Stream] = {}

    def launch(self, name: str) -> str:
        self.before[name] = set(self.current.done)
        self.stream_of[name] = self.current
        self.current.done.add(name)
        return name

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        outer, self.current = self.current, stream
        yield
        self.current = outer


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(lanes, "_streams", lambda _: device.streams)
    monkeypatch.setattr(torch.cuda, "stream", device.on)
    return device


def test_jobs_fork_from_the_current_stream_and_join_it(device: Device) -> None:
    device.launch("first")
    names = ["a", "b", "c"]
    assert side_by_side(ANYWHERE, [partial(device.launch, name) for name in names]) == names
    device.launch("last")
    assert all(device.before[name] == {"first"} for name in names)
    assert device.before["last"] == {"first", *names}
    assert len({device.stream_of[name] for name in names}) == 3


def test_more_jobs_than_streams_follow_each_other(device: Device) -> None:
    names = [str(index) for index in range(2 * LANES + 1)]
    assert side_by_side(ANYWHERE, [partial(device.launch, name) for name in names]) == names
    assert device.before["0"] == set() and device.before[str(LANES)] == {"0"}
    assert device.launch("last") and device.before["last"] == set(names)


@pytest.mark.parametrize("outer", range(1, LANES + 2))
@pytest.mark.parametrize("inner", [1, 2, 5])
def test_memory_is_taken_again_after_its_last_use(outer: int, inner: int, device: Device) -> None:
    """A job reads what its own jobs left on their streams, and then the next jobs take these.

    Whatever comes on a stream must follow the reading of everything that was allocated there.
    """
    readers: dict[Stream, set[str]] = {stream: set() for stream in device.streams}

    def take(name: str) -> str:
        device.launch(name)
        assert readers[device.current] <= device.before[name]
        return name

    def job(name: str) -> list[str]:
        for round_ in range(2):
            parts = [partial(take, f"{name} {round_} {part}") for part in range(inner)]
            taken = side_by_side(ANYWHERE, parts)
            reader = device.launch(f"{name} {round_} read")
            assert set(taken) <= device.before[reader]
            for part in taken:
                readers[device.stream_of[part]].add(reader)
        return taken

    for step in range(2):
        found = side_by_side(ANYWHERE, [partial(job, f"{step} {index}") for index in range(outer)])
        reader = device.launch(f"{step} read")
        for part in (part for parts in found for part in parts):
            assert part in device.before[reader]
            readers[device.stream_of[part]].add(reader)


@pytest.fixture
def background_device(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    device.made: list[Stream] = []

    def make(_: torch.device) -> Stream:
        device.made.append(Stream())
        return device.made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.current)
    return device


def test_background_jobs_run_beside_what_follows(background_device: Device) -> None:
    device = background_device
    device.launch("before")
    with background(ANYWHERE):
        in_background(ANYWHERE, partial(device.launch, "first"))
        device.launch("between")
        in_background(ANYWHERE, partial(device.launch, "second"))
        device.launch("beside")
    device.launch("after")
    (stream,) = device.made
    assert device.stream_of["first"] is device.stream_of["second"] is stream
    assert device.before["first"] == {"before"}
    assert device.before["second"] == {"before", "first", "between"}
    assert device.before["beside"] == {"before", "between"}
    assert device.before["after"] >= {"first", "second", "beside"}


def test_a_background_without_jobs_is_not_waited_for(background_device: Device) -> None:
    """Its stream is no part of the capture, which may not wait for others."""
    with background(ANYWHERE):
        background_device.launch("beside")
    (stream,) = background_device.made
    stream.done.add("elsewhere")
    background_device.launch("after")
    assert background_device.before["after"] == {"beside"}


def test_what_a_background_job_reads_is_held_until_the_end(background_device: Device) -> None:
    value = torch.ones(1)
    gone = weakref.ref(value)
    with background(ANYWHERE):
        in_background(ANYWHERE, partial(background_device.launch, str(float(value))))
        in_background(ANYWHERE, partial(lambda held: None, value))
        del value
        gc.collect()
        assert gone() is not None
    gc.collect()
    assert gone() is None


def test_outside_a_background_and_in_jobs_the_work_is_done_at_once(
    background_device: Device,
) -> None:
    device = background_device
    in_background(ANYWHERE, partial(device.launch, "alone"))
    assert device.stream_of["alone"] is device.current
    with background(ANYWHERE):
        inside = partial(in_background, ANYWHERE, partial(device.launch, "inside"))
        side_by_side(ANYWHERE, [inside, partial(device.launch, "other")])
    assert device.stream_of["inside"] not in device.made


def test_gradients_for_later_run_beside_what_follows(background_device: Device) -> None:
    device = background_device
    device.launch("before")
    with gradients_later(ANYWHERE):
        jobs = [partial(device.launch, "map")]
        later = [partial(device.launch, "weight")]
        assert side_by_side(ANYWHERE, jobs, later) == ["map", "weight"]
        device.launch("beside")
    device.launch("after")
    (stream,) = device.made
    assert device.stream_of["weight"] is stream and device.before["weight"] == {"before"}
    assert device.before["map"] == {"before"} and device.before["beside"] == {"before", "map"}
    assert device.before["after"] >= {"weight", "beside"}


def test_gradients_for_later_come_after_what_their_jobs_have_done(
    background_device: Device,
) -> None:
    device = background_device

    def job(name: str) -> None:
        device.launch(name)
        side_by_side(ANYWHERE, [], [partial(device.launch, f"{name} weight")])
        device.launch(f"{name} last")

    with gradients_later(ANYWHERE):
        side_by_side(ANYWHERE, [partial(job, "a"), partial(job, "b")])
        device.launch("beside")
    assert "a" in device.before["a weight"] and "b" in device.before["b weight"]
    assert "b last" in device.before["beside"] and "b weight" not in device.before["beside"]


def test_whoever_reads_earlier_waits(background_device: Device) -> None:
    device = background_device
    with gradients_later(ANYWHERE):
        side_by_side(ANYWHERE, [], [partial(device.launch, "weight")])
        settle(ANYWHERE)
        device.launch("reader")
    assert "weight" in device.before["reader"]
    settle(ANYWHERE)


def test_gradients_that_autograd_adds_up_are_waited_for(background_device: Device) -> None:
    """Those of a weight that comes again, and of what is no leaf."""
    device = background_device

    def put_off(name: str, owners: tuple[int, ...] | None) -> None:
        side_by_side(ANYWHERE, [], [partial(device.launch, name)])
        settle(ANYWHERE, owners)
        device.launch(f"after {name}")

    with gradients_later(ANYWHERE):
        put_off("first", (1, 2))
        put_off("other", (3,))
        assert "other" not in device.before["after other"]
        put_off("again", (2, 4))
        assert {"first", "again"} <= device.before["after again"]
        put_off("computed", None)
        assert "computed" in device.before["after computed"]
    settle(ANYWHERE)


def test_without_gradients_for_later_there_is_nothing_to_wait_for(
    background_device: Device,
) -> None:
    """Their stream is no part of the capture then, which may not wait for others."""
    with gradients_later(ANYWHERE):
        side_by_side(ANYWHERE, [partial(background_device.launch, "map")])
        background_device.made[0].done.add("elsewhere")
        settle(ANYWHERE)
    background_device.launch("after")
    assert background_device.before["after"] == {"map"}


def test_elsewhere_gradients_for_later_are_jobs_like_others(device: Device) -> None:
    found = side_by_side(ANYWHERE, [lambda: "map"], [partial(device.launch, "weight")])
    assert found == ["map", "weight"] and device.stream_of["weight"] in device.streams
    assert device.launch("after") and "weight" in device.before["after"]


def test_what_reads_gradients_for_later_runs_beside_the_next_jobs(
    background_device: Device,
) -> None:
    device = background_device

    def launch(name: str) -> None:
        device.launch(name)

    def job() -> str:
        side_by_side(ANYWHERE, [], [partial(device.launch, "last weight")])
        return device.launch("map")

    with gradients_later(ANYWHERE):
        side_by_side(ANYWHERE, [], [partial(device.launch, "weight")])
        beside_next(ANYWHERE, partial(launch, "reader"))
        device.launch("between")
        other = partial(device.launch, "other")
        assert side_by_side(ANYWHERE, [job, other]) == ["map", "other"]
        device.launch("beside")
        beside_next(ANYWHERE, partial(launch, "reader at the end"))
    device.launch("after")
    assert {"weight", "between"} <= device.before["reader"]
    assert "last weight" not in device.before["reader"]
    places = [device.stream_of[name] for name in ("map", "other")]
    assert places == list(device.streams[:2])  # As without it, and as in the forward pass.
    assert "reader" not in device.before["map"] and "reader" in device.before["beside"]
    assert "last weight" in device.before["reader at the end"]
    assert "reader at the end" in device.before["after"]


def test_elsewhere_it_runs_at_once(device: Device) -> None:
    beside_next(ANYWHERE, partial(device.launch, "reader"))  # type: ignore[arg-type]
    assert device.launch("next") and "reader" in device.before["next"]


def test_what_is_read_later_is_held_until_the_current_stream_has_waited(
    background_device: Device,
) -> None:
    device = background_device
    gone: list[weakref.ref[torch.Tensor]] = []

    def put_off(name: str) -> None:
        value = torch.ones(1)
        gone.append(weakref.ref(value))

        def job(value: torch.Tensor) -> None:
            dropped = torch.ones(1)
            gone.append(weakref.ref(dropped))
            keep_until_joined(dropped)
            device.launch(name)

        side_by_side(ANYWHERE, [], [partial(job, value)])

    with gradients_later(ANYWHERE):
        put_off("first")
        for turn in range(TURNS):
            put_off(f"later {turn}")
            gc.collect()
            assert all(one() is not None for one in gone)
            device.launch(f"beside {turn}")
            assert "first" not in device.before[f"beside {turn}"]
        side_by_side(ANYWHERE, [partial(device.launch, "last")])
        gc.collect()
        assert [one() is None for one in gone[:3]] == [True, True, False]
        assert "first" in device.before["last"] and "later 0" not in device.before["last"]


def test_what_jobs_drop_lives_until_the_outermost_join(device: Device) -> None:
    gone: list[weakref.ref[torch.Tensor]] = []

    def dropping() -> None:
        value = torch.ones(1)
        gone.append(weakref.ref(value))
        keep_until_joined(value)

    def nested() -> None:
        side_by_side(ANYWHERE, [dropping, dropping])
        gc.collect()
        assert all(one() is not None for one in gone)

    side_by_side(ANYWHERE, [nested, partial(device.launch, "other")])
    gc.collect()
    assert len(gone) == 2 and all(one() is None for one in gone)
    dropping()
    gc.collect()
    assert gone[-1]() is None


def test_without_streams_jobs_run_in_order() -> None:
    seen: list[int] = []
    assert side_by_side(ANYWHERE, [partial(seen.append, index) for index in range(3)]) == [None] * 3
    assert seen == [0, 1, 2]
    assert side_by_side(ANYWHERE, []) == []


def assert_captured_as_eager(work: Callable[[], torch.Tensor]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = work()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        torch.testing.assert_close(captured, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("jobs", [0, 2])
def test_a_capture_may_have_background_jobs_or_none(jobs: int) -> None:
    x, counts = torch.zeros(3, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), background(x.device):
        for _ in range(jobs):
            in_background(x.device, partial(counts.add_, 1))
        x += 1
    graph.replay()
    assert x.tolist() == [1, 1, 1] and counts.tolist() == [jobs, jobs]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_for_later_read_what_has_been_dropped_since() -> None:
    """Short jobs drop what slow ones still read, and the next ones take its memory."""
    torch.manual_seed(0)
    x = torch.randn(500, 500, device="cuda") / 500**0.5

    def slow(y: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            y = torch.tanh(y @ x)
        return y

    def work() -> torch.Tensor:
        weights, y = [], x

        def job(start: torch.Tensor) -> torch.Tensor:
            own = start * 1.5 + 1
            weights.extend(side_by_side(x.device, [], [lambda: slow(own)]))
            return own.relu() @ x

        with gradients_later(x.device):
            for _ in range(4 * (TURNS + 1)):
                halves = side_by_side(x.device, [partial(job, y), partial(job, -y)])
                y = torch.tanh(halves[0] - halves[1])
        return torch.stack(weights)

    assert_captured_as_eager(work)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_computes_what_eager_jobs_do() -> None:
    """Long jobs that allocate and free, regions after each other, more jobs than streams."""
    torch.manual_seed(0)
    x = torch.randn(300, 300, device="cuda") / 300**0.5
    jobs = LANES + 2

    def chain(start: torch.Tensor, factor: float) -> torch.Tensor:
        y = start * factor
        for _ in range(10):
            y = torch.tanh(y @ x)
        halves = side_by_side(x.device, [lambda: y.relu() @ x, lambda: (-y).relu() @ x])
        return halves[0] - halves[1]

    def work() -> torch.Tensor:
        total = x
        for _ in range(3):
            parts = [partial(chain, total, 1.0 + index) for index in range(jobs)]
            total = torch.stack(side_by_side(x.device, parts)).mean(0)
        return total

    assert_captured_as_eager(work)

"""Frames through slots: no slot is overwritten before its launch reads it, wherever frames lie."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lgcnet_fast.deploy import lower, replay, slots
from lgcnet_fast.deploy.fused import FusedNetwork
from lgcnet_fast.deploy.replay import Replay, Turns
from lgcnet_fast.deploy.slots import Slots
from tests.deploy.test_plan import planned, small_network

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
COUNT = 4
SIZE = (9, 14)
ADDRESSES = [(100 + 2 * i, 101 + 2 * i) for i in range(5 * COUNT + 3)]


class LazyGpu:
    """Does what it was given when somebody waits for it, and no more than that."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], object]] = deque()
        self.given = self.done = self.waits = 0

    def give(self, work: Callable[[], object]) -> None:
        self.queue.append(work)
        self.given += 1

    def work_until(self, end: int) -> None:
        self.waits += end > self.done
        while self.done < end:
            self.queue.popleft()()
            self.done += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> LazyGpu:
    """With slots as few as `COUNT`."""
    gpu = LazyGpu()

    class Event:
        at = 0

        def record(self) -> None:
            self.at = gpu.given

        def synchronize(self) -> None:
            gpu.work_until(self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(slots, "SLOTS", COUNT)
    return gpu


def some_slots() -> Slots:
    return Slots(torch.zeros(1, 2, 3, 3, dtype=torch.uint8), torch.zeros(1, 2, 3).byte())


def addresses(taken: Slots) -> tuple[int, int]:
    return int(taken.image.address), int(taken.labels.address)


def frames_of(ring: Slots, gpu: LazyGpu) -> list[tuple[int, int]]:
    """What each launch has found, where the host hands over `ADDRESSES`."""
    found: list[tuple[int, int]] = []

    def kernels() -> None:
        ring.take()
        found.append(addresses(ring))

    for pair in ADDRESSES:
        ring.run(lambda: gpu.give(kernels), *pair)
    gpu.work_until(gpu.given)
    return found


def test_every_launch_finds_its_frame_however_late(gpu: LazyGpu) -> None:
    assert frames_of(some_slots(), gpu) == ADDRESSES


def test_the_host_waits_once_for_half_the_slots(gpu: LazyGpu) -> None:
    ring = some_slots()
    for at, pair in enumerate(ADDRESSES):
        ring.run(lambda: gpu.give(ring.take), *pair)
        assert gpu.given - gpu.done <= COUNT
        assert gpu.waits == max(0, at // (COUNT // 2) - 1)


@pytest.mark.parametrize("rehearsals", [1, 3, COUNT, COUNT + 2])
def test_rehearsals_take_slots_too(gpu: LazyGpu, rehearsals: int) -> None:
    image, labels = torch.zeros(1, 2, 3, 3).byte(), torch.zeros(1, 2, 3).byte()
    ring = Slots(image, labels)
    for _ in range(rehearsals):
        ring.take()
        assert addresses(ring) == (image.data_ptr(), labels.data_ptr())
    assert frames_of(ring, gpu) == ADDRESSES


@pytest.mark.parametrize("is_launched", [False, True])
@pytest.mark.parametrize("frames", range(COUNT + 1))
def test_an_interrupt_beside_a_launch(gpu: LazyGpu, frames: int, is_launched: bool) -> None:
    ring = some_slots()

    def launch() -> None:
        if is_launched:
            gpu.give(ring.take)
        raise KeyboardInterrupt

    for pair in ADDRESSES[:frames]:
        ring.run(lambda: gpu.give(ring.take), *pair)
    with pytest.raises(KeyboardInterrupt):
        ring.run(launch, 1, 2)
    # As reading the turn from a GPU does.
    gpu.work_until(gpu.given)
    assert frames_of(ring, gpu) == ADDRESSES


def test_a_slot_can_be_written_again_before_its_launch(gpu: LazyGpu) -> None:
    ring = some_slots()
    for _ in range(2 * COUNT):
        ring.write(1, 2)
    assert frames_of(ring, gpu) == ADDRESSES


# -- networks, interpreted ------------------------------------------------------------------------


class Begin:
    """In the place of `Turns`."""

    def begin(self) -> None: ...


def without_graph(first: Any, calls: Any, order: Any, last: Any, turns: Any) -> Any:
    """In the place of `_recorded`: as on a GPU, but done at once."""

    def run() -> None:
        for call in (*first, *calls, *last):
            call()

    return run


@pytest.fixture
def on_slots(
    gpu: LazyGpu, large_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> Replay[FusedNetwork]:
    monkeypatch.setattr(replay, "_recorded", without_graph)
    network = FusedNetwork(planned(small_network(), SIZE), torch.device("cpu"))
    turns: Any = Begin()
    return Replay(network, True, turns)


def pictures(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, *SIZE, 3), generator=generator, dtype=torch.uint8)


def expected_labels(network: FusedNetwork, images: Tensor) -> Tensor:
    network.image.copy_(images)
    network.run()
    labels = torch.empty(images.shape[:3], dtype=torch.uint8)
    network.write_labels(labels)
    return labels


def unaligned(images: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1).byte(), images.flatten()])[1:].view(images.shape)


IN_PLACE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.clone,
    unaligned,
    lambda x: torch.cat([x, x])[1:],
)
COPIED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    lambda x: x.float(),
)


def test_images_of_every_layout(on_slots: Replay[FusedNetwork]) -> None:
    network, images = on_slots.network, (pictures(1), pictures(2))
    expected = [expected_labels(network, one) for one in images]
    assert not torch.equal(*expected)
    found = []
    for at, lay_out in enumerate(IN_PLACE + COPIED):
        network.image.zero_()
        network.arena.fill_(255)
        found.append(on_slots.labels_of(lay_out(images[at % 2])))
        assert torch.equal(network.image, images[at % 2]) == (lay_out in COPIED)
    # More frames than slots, whose labels have stayed as they were.
    assert len(found) > COUNT
    assert all(torch.equal(one, expected[at % 2]) for at, one in enumerate(found))


def test_parts_leave_host_and_kernels_in_step(on_slots: Replay[FusedNetwork]) -> None:
    ring = on_slots._slots
    assert ring is not None
    on_slots._run = ring.take
    for part in on_slots.parts(pictures(1)).values():
        for _ in range(COUNT + 1):
            part()
    images = pictures(2)
    labels = on_slots.labels_of(images)
    assert addresses(ring) == (images.data_ptr(), labels.data_ptr())


def test_memory_goes_with_the_replay(on_slots: Replay[FusedNetwork]) -> None:
    """Not when Python next looks for cycles."""
    network = FusedNetwork(on_slots.network.plan, torch.device("cpu"))
    turns: Any = Begin()
    one = Replay(network, True, turns)
    held = weakref.ref(one), weakref.ref(network.arena), weakref.ref(one._slots)
    gc.disable()
    try:
        del one, network
        assert [reference() for reference in held] == [None] * 3
    finally:
        gc.enable()


def test_more_classes_than_one_launch_ranks_have_no_slots(
    gpu: LazyGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower, "MOST_CLASSES", 4)
    network = FusedNetwork(planned(small_network(), SIZE), torch.device("cpu"))
    assert network.on_slots(torch.zeros(1, *SIZE).byte()) is None


# -- turns ----------------------------------------------------------------------------------------


def test_another_stream_waits_for_all_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    current = [1]

    class Event:
        def record(self, stream: int) -> None:
            log.append(("record", stream))

        def wait(self, stream: int) -> None:
            log.append(("wait", stream))

    fakes = {
        "graph_pool_handle": lambda: 0,
        "Stream": lambda: None,
        "Event": Event,
        "current_device": lambda: 0,
        "current_stream": lambda: current[0],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(replay, "_current_handle", lambda device: current[0])
    turns = Turns()
    turns.finish()
    for current[0] in (1, 1, 2, 2, 1):
        turns.begin()
    assert log == [("record", 1), ("wait", 2), ("record", 2), ("wait", 1)]

"""Addresses in CUDA graphs: which arguments they are, when they stay, and how they change."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from typing import Any

import pytest
import torch
from torch import Tensor

from lgcnet_fast.deploy import graph_pointers, replay
from lgcnet_fast.deploy.graph_pointers import (
    KernelParameters,
    Pointer,
    cuda_driver,
    graph_to_change,
    kernel_nodes,
    pointers_to,
)
from lgcnet_fast.deploy.replay import Replay
from lgcnet_fast.errors import DeviceError
from tests.deploy.fake_graph import FIRST, LAST, FakeGraph, address

SHAPE = (1, 5, 8)
COPY, HOST = 1, 3
"""Kinds of nodes."""


def picture(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (*SHAPE, 3), dtype=torch.uint8, generator=generator)


def labels_by_hand(image: Tensor) -> Tensor:
    return image[..., 0].to(torch.uint8) + 1


@pytest.fixture(params=[False, True], ids=["function", "kernel"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGraph:
    graph = FakeGraph(picture(0), torch.zeros(SHAPE, dtype=torch.uint8), request.param)
    monkeypatch.setattr(graph_pointers, "cuda_driver", lambda: graph)
    monkeypatch.setattr(graph_pointers, "HAS_HANDLES", True)
    return graph


def both(fake: FakeGraph) -> list[Pointer | None]:
    graph: Any = fake
    return pointers_to(graph, (fake.image, fake.labels))


# -- what the driver tells and takes --------------------------------------------------------------


def test_parameters_lie_as_in_the_header() -> None:
    offsets = {
        "function": 0, "grid": 8, "block": 20, "shared_bytes": 32, "arguments": 40, "extra": 48,
        "kernel": 56, "context": 64,
    }  # fmt: skip
    assert {name: getattr(KernelParameters, name).offset for name in offsets} == offsets
    assert ctypes.sizeof(KernelParameters) == 72


def test_arguments_are_read_byte_by_byte(fake: FakeGraph) -> None:
    graph: Any = fake
    fake.instantiate()
    for kernel, node in zip(kernel_nodes(fake, graph), (FIRST, LAST), strict=True):
        assert kernel.sizes == [len(value) for value in fake.values[node]]
        found = [
            bytes(words)[:size] for words, size in zip(kernel.arguments, kernel.sizes, strict=True)
        ]
        assert found == fake.values[node]


def test_only_the_address_changes(fake: FakeGraph) -> None:
    source, target = both(fake)
    assert source is not None and target is not None
    source.set(0x7F00_1234_5678_0010)
    target.set(0x7F00_8765_4321_0020)
    _, *others = fake.values[FIRST]
    assert fake.now[FIRST] == [struct.pack("<Q", 0x7F00_1234_5678_0010), *others]
    scale, _, *others = fake.values[LAST]
    structure = struct.pack("<qqQ", -1, 3, 0x7F00_8765_4321_0020)
    assert fake.now[LAST] == [scale, structure, *others]
    assert fake.updates == [FIRST, LAST]


def test_an_address_that_stays_is_not_set_again(fake: FakeGraph) -> None:
    source, _ = both(fake)
    assert source is not None
    for place in (fake.image.data_ptr(), 4096, 4096, 8192, 4096):
        source.set(place)
    assert fake.updates == [FIRST] * 3


def test_two_addresses_in_one_kernel(fake: FakeGraph) -> None:
    fake.values[FIRST] = [*fake.values[FIRST], address(fake.labels)]
    fake.values[LAST] = []
    source, target = both(fake)
    assert source is not None and target is not None
    source.set(4096)
    target.set(8192)
    assert fake.now[FIRST][0] == struct.pack("<Q", 4096)
    assert fake.now[FIRST][-1] == struct.pack("<Q", 8192)


def test_a_thread_without_context_gets_it(fake: FakeGraph) -> None:
    source, _ = both(fake)
    assert source is not None
    context, fake.current = fake.current, None
    with ThreadPoolExecutor(1) as thread:
        thread.submit(source.set, 4096).result()
    assert fake.current == context and fake.now[FIRST][0] == struct.pack("<Q", 4096)


def test_what_failed_is_said_and_tried_again(fake: FakeGraph) -> None:
    source, _ = both(fake)
    assert source is not None
    fake.codes = [999]
    with pytest.raises(DeviceError, match="arguments of a kernel.*CUDA_ERROR_SOMETHING"):
        source.set(4096)
    source.set(4096)
    assert fake.updates == [FIRST, FIRST] and fake.now[FIRST][0] == struct.pack("<Q", 4096)


# -- when addresses stay as they are --------------------------------------------------------------


def test_an_address_that_no_kernel_has(fake: FakeGraph) -> None:
    fake.values[LAST] = fake.values[LAST][2:]
    source, target = both(fake)
    assert source is not None and target is None


@pytest.mark.parametrize("beyond", [0, 1, 119])
def test_a_second_argument_within_the_image(fake: FakeGraph, beyond: int) -> None:
    fake.values[LAST].append(struct.pack("<Q", fake.image.data_ptr() + beyond))
    source, target = both(fake)
    assert source is None and target is not None


def test_an_argument_behind_the_image_does_not_count(fake: FakeGraph) -> None:
    assert fake.image.nbytes == 120
    fake.values[LAST].append(struct.pack("<Q", fake.image.data_ptr() + 120))
    assert both(fake)[0] is not None


def test_the_only_argument_within_the_image_is_not_its_start(fake: FakeGraph) -> None:
    fake.values[FIRST][0] = struct.pack("<Q", fake.image.data_ptr() + 3)
    assert both(fake)[0] is None


def test_addresses_across_words_do_not_count(fake: FakeGraph) -> None:
    fake.values[FIRST][0] = b"\0\0\0\0" + address(fake.image)
    assert both(fake)[0] is None


@pytest.mark.parametrize("kind", [COPY, HOST])
def test_nodes_that_hide_what_they_read(fake: FakeGraph, kind: int) -> None:
    fake.kinds[10] = kind
    assert both(fake) == [None, None]


def test_a_driver_that_does_not_tell(fake: FakeGraph, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fake.cuGraphKernelNodeGetParams_v2 = lambda node, found: 1  # type: ignore[method-assign]
    assert both(fake) == [None, None] and "CUDA_ERROR_SOMETHING" in caplog.text
    assert fake.instantiated == 1


def test_arguments_in_one_block(fake: FakeGraph) -> None:
    asked = fake.cuGraphKernelNodeGetParams_v2

    def without_list(node: Any, found: Any) -> int:
        asked(node, found)
        found._obj.arguments = None
        return 0

    fake.cuGraphKernelNodeGetParams_v2 = without_list  # type: ignore[method-assign]
    assert both(fake) == [None, None]


@pytest.fixture
def no_driver() -> Iterator[None]:
    cuda_driver.cache_clear()
    yield
    cuda_driver.cache_clear()


@pytest.mark.usefixtures("no_driver")
def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_pointers, "LIBRARY", "libcuda_that_nobody_has.so.1")
    assert cuda_driver() is None


@pytest.mark.usefixtures("no_driver")
def test_a_driver_without_the_calls_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    any_library = find_library("c")
    if any_library is None:
        pytest.skip("no C library")
    monkeypatch.setattr(graph_pointers, "LIBRARY", any_library)
    assert cuda_driver() is None


@pytest.mark.parametrize("missing", ["handles", "driver"])
def test_old_versions_record_as_ever(
    fake: FakeGraph, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    kept: list[dict[str, bool]] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda **options: kept.append(options))
    graph_to_change()
    if missing == "handles":
        monkeypatch.setattr(graph_pointers, "HAS_HANDLES", False)
    else:
        monkeypatch.setattr(graph_pointers, "cuda_driver", lambda: None)
    graph_to_change()
    assert kept == [{"keep_graph": True}, {}]
    assert both(fake) == [None, None] and fake.instantiated == 0


# -- frames ---------------------------------------------------------------------------------------


class Network:
    """Of which the fake graph is the recording."""

    calls, schedule = (), None

    def __init__(self, image: Tensor) -> None:
        self.image = image

    def write_labels(self, labels: Tensor) -> None:
        raise AssertionError("only within the graph")


class NoTurns:
    def begin(self) -> None: ...
    def end(self) -> None: ...


@pytest.fixture
def frames(fake: FakeGraph, monkeypatch: pytest.MonkeyPatch) -> Replay[Any]:
    turns: Any = NoTurns()
    monkeypatch.setattr(replay, "_recorded", lambda *arguments: fake)
    # A recording holds the address of the labels that the replay makes.
    monkeypatch.setattr(Tensor, "new_empty", lambda *arguments, **options: fake.labels)
    made: Replay[Any] = Replay(Network(fake.image), True, turns)
    monkeypatch.undo()
    return made


@pytest.fixture
def copied(fake: FakeGraph, frames: Replay[Any]) -> Replay[Any]:
    """As where no pointer was found."""
    frames._source = frames._target = None
    return frames


def test_every_frame_has_labels_of_its_own(fake: FakeGraph, frames: Replay[Any]) -> None:
    images = [picture(seed) for seed in range(4)]
    found = [frames.labels_of(image) for image in images]
    for image, labels in zip(images, found, strict=True):
        assert labels.dtype == torch.uint8 and torch.equal(labels, labels_by_hand(image))
    assert fake.updates == [FIRST, LAST] * 4
    assert torch.equal(fake.image, picture(0)) and not fake.labels.any()


def test_copies_give_the_same(fake: FakeGraph, copied: Replay[Any]) -> None:
    images = [picture(seed) for seed in range(4)]
    found = [copied.labels_of(image) for image in images]
    assert all(map(torch.equal, found, map(labels_by_hand, images)))
    assert not fake.updates


MISFITS = {
    "permuted": picture(1).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "sliced": picture(1).repeat_interleave(2, 2)[:, :, ::2],
    "another-dtype": picture(1).float(),
    "unaligned": torch.cat([torch.zeros(8, dtype=torch.uint8), picture(1).flatten()])[8:].view(
        *SHAPE, 3
    ),
}


@pytest.mark.parametrize("image", MISFITS.values(), ids=MISFITS)
def test_images_that_kernels_were_not_made_for_are_copied(
    fake: FakeGraph, frames: Replay[Any], image: Tensor
) -> None:
    before = frames.labels_of(picture(2))
    found = frames.labels_of(image)
    assert torch.equal(found, labels_by_hand(picture(1)))
    assert torch.equal(fake.image, picture(1))
    assert torch.equal(before, labels_by_hand(picture(2)))
    # And back.
    assert torch.equal(frames.labels_of(picture(2)), before)


def test_timed_launches_leave_the_memory_of_callers_alone(
    fake: FakeGraph, frames: Replay[Any]
) -> None:
    image = picture(1)
    labels = frames.labels_of(image)
    before = labels.clone()
    image.zero_()
    frames.run()
    assert torch.equal(labels, before)
    assert torch.equal(fake.labels, labels_by_hand(fake.image))


@pytest.mark.parametrize("codes", [[999], [0, 999]], ids=["image", "labels"])
def test_after_a_failure_no_frame_is_wrong(
    fake: FakeGraph, frames: Replay[Any], codes: list[int]
) -> None:
    image, another = picture(1), picture(2)
    first = frames.labels_of(image)
    fake.codes = list(codes)
    with pytest.raises(DeviceError, match="CUDA_ERROR_SOMETHING"):
        frames.labels_of(another)
    assert not fake.codes
    assert torch.equal(frames.labels_of(another), labels_by_hand(another))
    assert torch.equal(first, labels_by_hand(image))

"""Copies within a CUDA graph: which of its nodes they are, and where their ends move."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from lgcnet_fast.deploy import graph_copies
from lgcnet_fast.deploy.graph_copies import (
    INVALID_CONTEXT,
    CopyParameters,
    copy_nodes,
    cuda_driver,
)
from lgcnet_fast.deploy.replay import FrameGraph
from lgcnet_fast.errors import DeviceError

CONTEXT = 0x5500_0000_0010
KERNEL, COPY = 0, 1


class FakeGraph:
    """In the place of the driver and of a graph: an image, its labels by `compute`, on the CPU.

    Its copies are nodes 11 and 13, between two kernels.
    """

    def __init__(self, image: Tensor, labels: Tensor) -> None:
        self.image, self.labels = image, labels
        self.pixels, self.result = torch.zeros_like(image), torch.zeros_like(labels)
        self.kinds = {10: KERNEL, 11: COPY, 12: KERNEL, 13: COPY}
        self.recorded = {
            11: parameters(self.pixels.data_ptr(), image.data_ptr(), image.nbytes),
            13: parameters(labels.data_ptr(), self.result.data_ptr(), labels.nbytes),
        }
        self.now = {node: clone(copy) for node, copy in self.recorded.items()}
        self.moves: list[int] = []
        self.codes: list[int] = []

    def raw_cuda_graph(self) -> int:
        return 7

    def raw_cuda_graph_exec(self) -> int:
        return 8

    def replay(self) -> None:
        for node in (11, 13):
            copy = self.now[node]
            ctypes.memmove(copy.target, copy.source, copy.width)
            if node == 11:
                self.labels.copy_(self.image[..., 0] + 1)

    # The driver's calls.

    def cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:
        assert graph.value == 7
        if nodes is not None:
            nodes[:] = list(self.kinds)
        count._obj.value = len(self.kinds)
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = self.kinds[node.value]
        return 0

    def cuGraphMemcpyNodeGetParams(self, node: Any, found: Any) -> int:
        ctypes.pointer(found._obj)[0] = self.recorded[node.value]
        return 0

    def cuGraphExecMemcpyNodeSetParams(self, graph: Any, node: Any, new: Any, context: Any) -> int:
        assert (graph.value, context.value) == (8, CONTEXT)
        self.moves.append(node.value)
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            self.now[node.value] = clone(new._obj)
        return code

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = CONTEXT
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        assert context.value == CONTEXT
        self.moves.append(-1)
        return 0

    def cuGetErrorName(self, code: Any, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_INVALID_VALUE"
        return 0


def parameters(source: int, target: int, width: int) -> CopyParameters:
    return CopyParameters(source=source, target=target, width=width, height=1, depth=1)


def clone(copy: CopyParameters) -> CopyParameters:
    return CopyParameters.from_buffer_copy(copy)


def picture(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (1, 5, 7, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def fake() -> FakeGraph:
    return FakeGraph(picture(0), torch.zeros(1, 5, 7, dtype=torch.uint8))


@pytest.fixture
def frame(fake: FakeGraph) -> FrameGraph:
    graph: Any = fake
    nodes = copy_nodes(fake, graph, fake.pixels.data_ptr(), fake.result.data_ptr())
    fake.moves.clear()
    return FrameGraph(graph, fake.image, *nodes)


def labels_of(frame: FrameGraph, image: Tensor) -> Tensor:
    labels = torch.zeros(1, 5, 7, dtype=torch.uint8)
    frame.run(image, labels)
    return labels


def test_parameters_lie_as_in_the_header() -> None:
    offsets = {"source": 48, "source_pitch": 72, "target": 136, "target_pitch": 160, "width": 176}
    assert {name: getattr(CopyParameters, name).offset for name in offsets} == offsets
    assert ctypes.sizeof(CopyParameters) == 200


def test_every_frame_has_labels_of_its_own(fake: FakeGraph, frame: FrameGraph) -> None:
    images = [picture(seed) for seed in (1, 2, 3)]
    found = [labels_of(frame, image) for image in images]
    assert all(
        torch.equal(*pair) for pair in zip(found, [i[..., 0] + 1 for i in images], strict=True)
    )
    assert fake.moves == [11, 13] * 3


def test_ends_that_stay_are_not_moved(fake: FakeGraph, frame: FrameGraph) -> None:
    image, labels = picture(1), torch.zeros(1, 5, 7, dtype=torch.uint8)
    for _ in range(3):
        frame.run(image, labels)
    assert fake.moves == [11, 13]
    image.copy_(picture(2))
    frame.run(image, labels)
    assert fake.moves == [11, 13] and torch.equal(labels, image[..., 0] + 1)


@pytest.mark.parametrize(
    "image",
    [
        picture(1).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        picture(1).repeat_interleave(2, 2)[:, :, ::2],
        picture(1).float(),
        torch.cat([picture(2), picture(1)])[1:],
    ],
    ids=["permuted", "sliced", "another-dtype", "part"],
)
def test_images_of_every_layout(frame: FrameGraph, image: Tensor) -> None:
    assert torch.equal(labels_of(frame, image), picture(1)[..., 0] + 1)


def test_memory_of_another_kind_is_copied_before(fake: FakeGraph, frame: FrameGraph) -> None:
    fake.codes = [1]
    assert torch.equal(labels_of(frame, picture(1)), picture(1)[..., 0] + 1)
    assert fake.moves == [11, 11, 13]


def test_a_thread_without_context_gets_it(fake: FakeGraph, frame: FrameGraph) -> None:
    fake.codes = [INVALID_CONTEXT]
    assert torch.equal(labels_of(frame, picture(1)), picture(1)[..., 0] + 1)
    assert fake.moves == [11, -1, 11, 13]


def test_an_end_that_failed_to_move_is_set_again(fake: FakeGraph, frame: FrameGraph) -> None:
    image, labels = picture(1), torch.zeros(1, 5, 7, dtype=torch.uint8)
    fake.codes = [0, 1]
    with pytest.raises(DeviceError, match="target of a copy.*CUDA_ERROR_INVALID_VALUE"):
        frame.run(image, labels)
    frame.run(image, labels)
    assert fake.moves == [11, 13, 13] and torch.equal(labels, picture(1)[..., 0] + 1)


def test_a_graph_without_the_copies_is_refused(fake: FakeGraph) -> None:
    graph: Any = fake
    fake.kinds[13] = KERNEL
    with pytest.raises(DeviceError, match="something else"):
        copy_nodes(fake, graph, fake.pixels.data_ptr(), fake.result.data_ptr())


def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_driver.cache_clear()
    monkeypatch.setattr(graph_copies, "LIBRARY", "libcuda_that_nobody_has.so.1")
    assert cuda_driver() is None
    cuda_driver.cache_clear()


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not graph_copies.IS_SUPPORTED, reason="before PyTorch 2.9")
def test_ends_of_a_recorded_graph_move() -> None:
    image = torch.zeros(1, 769, 1537, 3, dtype=torch.uint8, device="cuda")
    pixels, result = torch.zeros_like(image), torch.zeros_like(image)
    image.bitwise_not_()  # Loads the kernel, which a recording must not.
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        image.copy_(pixels)
        image.bitwise_not_()
        result.copy_(image)
    graph.instantiate()
    nodes = copy_nodes(cuda_driver(), graph, pixels.data_ptr(), result.data_ptr())
    frame = FrameGraph(graph, image, *nodes)
    images = [torch.randint_like(image, 256) for _ in range(4)]
    images += [torch.cat(images)[1:2], images[0].flip(2), images[0]]
    found = [torch.empty_like(image) for _ in images]
    for pair in zip(images, found, strict=True):
        frame.run(*pair)
    assert all(torch.equal(~one, other) for one, other in zip(images, found, strict=True))

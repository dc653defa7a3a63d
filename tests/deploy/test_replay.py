"""The fused engine as applications meet it: sizes, batches, threads, the choice of the backend."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lgcnet_fast.deploy import Segmenter, graph_pointers, replay
from lgcnet_fast.deploy.blueprint import Blueprint, run_blueprint
from lgcnet_fast.deploy.engine import Engine, ReferenceEngine
from lgcnet_fast.deploy.replay import FusedEngine, GraphEngine
from lgcnet_fast.errors import BackendError, DataError
from lgcnet_fast.ops import use_backend
from tests.deploy.run_folders import SIZE, make_run_folder
from tests.deploy.test_segmenter import picture

GRAPHS = ("triton", "cuda")
"""Backends whose engines are CUDA graphs."""
ROUNDING = 2e-3
"""Share of pixels whose two best classes are as good as equal."""


@pytest.fixture(scope="module")
def blueprint(run_folder: Path) -> Blueprint:
    return run_blueprint(run_folder)


@pytest.fixture(scope="module")
def own_size(tmp_path_factory: pytest.TempPathFactory) -> Blueprint:
    """Of a run that takes every image at its own size."""
    return run_blueprint(make_run_folder(tmp_path_factory.mktemp("runs") / "run", size="image"))


def pixels(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(picture(size, seed))


def assert_same_labels(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    assert (found.cpu() != expected.cpu()).float().mean() <= ROUNDING


@pytest.fixture(scope="module")
def fused(run_folder: Path) -> Segmenter:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Segmenter.load(run_folder, device, backend="triton")


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", [SIZE, (40, 60)])
def test_fused_equals_reference(fused: Segmenter, segmenter: Segmenter, size) -> None:
    image = picture(size)
    assert (fused(image) != segmenter(image)).mean() <= ROUNDING


@pytest.mark.usefixtures("large_tiles")
def test_results_are_not_overwritten(fused: Segmenter) -> None:
    first = fused(pixels(SIZE))
    before = first.clone()
    second = fused(pixels(SIZE, 1))
    assert torch.equal(first, before) and not torch.equal(first, second)


@pytest.mark.usefixtures("large_tiles")
def test_batches(own_size: Blueprint, device: torch.device) -> None:
    images = torch.stack([pixels((17, 30), seed) for seed in range(2)])
    labels = Engine(own_size, device, backend="triton").batch_labels(images)
    reference = Engine(own_size, torch.device("cpu"))
    for image, found in zip(images, labels, strict=True):
        assert_same_labels(found, reference.labels(image))


def test_frames_in_a_stream(blueprint: Blueprint, device: torch.device) -> None:
    check_stream(Engine(blueprint, device))


def check_stream(engine: Engine) -> None:
    frames = [picture(SIZE, seed) for seed in range(5)]
    frames += [picture((30, 20), seed) for seed in range(4)]
    found = list(engine.stream(iter(frames)))
    expected = [engine.labels(torch.from_numpy(frame)).cpu().numpy() for frame in frames]
    assert len(found) == len(frames)
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_frame_that_is_none_is_named(blueprint: Blueprint, device: torch.device) -> None:
    with pytest.raises(DataError, match=r"float32.*uint8"):
        list(Engine(blueprint, device).stream([np.zeros((8, 8, 3), np.float32)]))


def test_a_stream_without_frames(blueprint: Blueprint, device: torch.device) -> None:
    assert list(Engine(blueprint, device).stream([])) == []


def test_the_least_recent_size_goes_first(
    own_size: Blueprint, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(replay, "MOST_REPLAYS", 2)
    monkeypatch.setattr(FusedEngine, "_made", lambda self, key: made.append(key) or Nothing())
    engine = Engine(own_size, device, backend="triton")
    for height in (1, 2, 1, 3, 1, 2):
        engine.labels(pixels((height, 5)))
    assert [key[1] for key in made] == [1, 2, 3, 2]


class Nothing:
    """In the place of a replay."""

    def labels_of(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., 0]


# -- backends -------------------------------------------------------------------------------------


def test_auto_on_the_cpu_is_the_reference(blueprint: Blueprint) -> None:
    assert isinstance(Engine(blueprint, torch.device("cpu")).runner, ReferenceEngine)


def test_auto_follows_the_choice_of_the_process(blueprint: Blueprint, device: torch.device) -> None:
    with use_backend("triton"):
        engine = Engine(blueprint, device)
    assert isinstance(engine.runner, FusedEngine)


def test_a_named_backend_serves_or_raises(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="deploy_engine"):
        Engine(blueprint, torch.device("cpu"), backend="cuda")
    with pytest.raises(BackendError, match="tensorflow.*triton"):
        Engine(blueprint, torch.device("cpu"), backend="tensorflow")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        Engine(blueprint, torch.device("cpu"), backend="triton")


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_graph_and_single_launches_give_the_same_bits(
    blueprint: Blueprint, dtype: str, backend: str
) -> None:
    engine = Engine(blueprint, torch.device("cuda"), dtype, backend)
    assert isinstance(engine.runner, GraphEngine)
    image = pixels(SIZE).cuda()[None]
    labels = engine.batch_labels(image)
    network = engine.runner.network(1, SIZE)
    logits = network.logits().clone()
    network.arena.fill_(255)
    network.image.copy_(image)
    network.run()
    again = torch.empty_like(labels)
    network.write_labels(again)
    assert torch.equal(network.logits(), logits) and torch.equal(again, labels)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gpu_equals_the_reference_on_the_cpu(own_size: Blueprint, dtype: str, backend: str) -> None:
    engine = Engine(own_size, torch.device("cuda"), dtype, backend)
    reference = Engine(own_size, torch.device("cpu"))
    for size in ((193, 257), (97, 130), (360, 480), (1, 1)):
        image = pixels(size)
        wrong = (engine.labels(image).cpu() != reference.labels(image)).float().mean()
        assert wrong <= (ROUNDING if dtype == "fp32" else 0.05), size


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
def test_frames_through_the_graph(blueprint: Blueprint, backend: str) -> None:
    check_stream(Engine(blueprint, torch.device("cuda"), "fp16", backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
def test_threads_on_streams_of_their_own(own_size: Blueprint, backend: str) -> None:
    engine = Engine(own_size, torch.device("cuda"), "fp16", backend)
    sizes = [(97, 129), (65, 97), (97, 129), (33, 200)]
    images = [pixels(sizes[i % 4], seed=i).cuda() for i in range(24)]
    expected = [engine.labels(image) for image in images]
    torch.cuda.synchronize()

    def serve(start: int) -> int:
        wrong = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(200):
                at = (start + 7 * i) % len(images)
                wrong += not torch.equal(engine.labels(images[at]), expected[at])
        return wrong

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(serve, range(3))) == [0, 0, 0]


@pytest.fixture
def copying(own_size: Blueprint, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Engine]:
    """Engines of a backend, in fp16, whose replays read and write only their own memory."""

    def make(backend: str) -> Engine:
        engine = Engine(own_size, torch.device("cuda"), "fp16", backend)
        recorded = engine.runner._made

        def made(key: replay.Key) -> replay.Replay:
            result = recorded(key)
            result._source = result._target = None
            return result

        monkeypatch.setattr(engine.runner, "_made", made)
        return engine

    return make


def unaligned(image: torch.Tensor) -> torch.Tensor:
    """Contiguous, three bytes behind an address that kernels expect."""
    return torch.cat([image.new_zeros(3), image.flatten()])[3:].view(image.shape)


@pytest.mark.gpu
@pytest.mark.skipif(
    not graph_pointers.HAS_HANDLES or graph_pointers.cuda_driver() is None,
    reason="PyTorch or the driver keeps the addresses in CUDA graphs",
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_frames_are_read_and_written_in_place(own_size: Blueprint, dtype: str) -> None:
    engine = Engine(own_size, torch.device("cuda"), dtype, "triton")
    image = pixels((97, 129)).cuda()
    engine.labels(image)
    made = engine.runner._replays[(1, 97, 129, False)]
    assert made._source is not None and made._target is not None
    static = made.network.image.clone()
    assert not torch.equal(static[0], image)
    again = engine.labels(image)
    assert torch.equal(made.network.image, static)
    image.zero_()
    made._labels.zero_()
    before = again.clone()
    engine.labels(image)
    assert torch.equal(again, before) and not made._labels.any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
def test_frames_in_place_and_copied_give_the_same_labels(
    own_size: Blueprint, copying: Callable[[str], Engine], backend: str
) -> None:
    engine, by_copies = Engine(own_size, torch.device("cuda"), "fp16", backend), copying(backend)
    sizes = [(97, 129), (65, 97)]
    images = [pixels(sizes[i % 2], seed=i).cuda() for i in range(24)]
    expected = [by_copies.labels(image) for image in images]
    assert len({labels.cpu().numpy().tobytes() for labels in expected}) == len(images)
    places = [unaligned(image) if i % 5 == 4 else image for i, image in enumerate(images)]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    kept: list[tuple[int, torch.Tensor]] = []
    # Nothing waits for the GPU, so that addresses change beneath frames on their way.
    for frame in range(2000):
        at = 7 * frame % len(images)
        image = places[at].clone() if frame % 3 == 0 else places[at]
        labels = engine.labels(image)
        wrong += (labels != expected[at]).any()
        if frame % 20 == 0:
            kept.append((at, labels))
    assert wrong.item() == 0
    assert all(torch.equal(labels, expected[at]) for at, labels in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
def test_layouts_and_places_of_images_give_the_same_labels(
    own_size: Blueprint, backend: str
) -> None:
    engine = Engine(own_size, torch.device("cuda"), "fp16", backend)
    wide = torch.from_numpy(picture((65, 194), 3)).cuda()
    image = wide[:, ::2].contiguous()
    planar = image.permute(2, 0, 1).contiguous()
    stacked = torch.stack([torch.zeros_like(image), image])
    expected = engine.labels(image.cpu()).cpu()
    views = [
        image, wide[:, ::2], planar.permute(1, 2, 0), unaligned(image), stacked[1], image.clone(),
        image,
    ]  # fmt: skip
    found = [engine.labels(view) for view in views]
    assert all(torch.equal(one.cpu(), expected) for one in found)
    # A thread that has called nothing of CUDA yet.
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(engine.labels, image.clone()).result().cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
def test_resized_images_in_place_and_copied(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    blueprint = run_blueprint(run_folder)
    images = [pixels((40 + seed, 60), seed).cuda() for seed in range(4)]
    engine = Engine(blueprint, torch.device("cuda"), "fp16", backend)
    found = [engine.labels(image) for image in images]
    monkeypatch.setattr(replay, "pointers_to", lambda graph, buffers: [None, None])
    engine = Engine(blueprint, torch.device("cuda"), "fp16", backend)
    assert all(map(torch.equal, found, map(engine.labels, images)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRAPHS)
def test_memory_stays_where_sizes_change(own_size: Blueprint, backend: str) -> None:
    engine = Engine(own_size, torch.device("cuda"), "fp16", backend)
    sizes = [(33 + 16 * i, 65 + 16 * i) for i in range(2 * replay.MOST_REPLAYS)]

    def serve() -> int:
        for size in sizes:
            engine.labels(pixels(size))
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    serve()
    before = serve()
    assert serve() - before <= 2**21

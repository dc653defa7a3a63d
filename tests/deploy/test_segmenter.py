"""The interface for applications: kinds of images, sizes, threads, bad input, a light import."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgcnet_fast.data.classes import CAMVID
from lgcnet_fast.deploy import Segmenter, argmax
from lgcnet_fast.deploy.argmax import argmax_labels
from lgcnet_fast.errors import ConfigError, DataError, DeviceError, UserError
from lgcnet_fast.ops import upsample_argmax
from lgcnet_fast.train.predictor import UnfoldedEngine
from lgcnet_fast.train.run import Run
from tests.deploy.run_folders import SIZE, make_run_folder

SIZES = [SIZE, (48, 96), (31, 20), (1, 1), (7, 300)]


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Blocks of colours, so that the classes form areas."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]])


# -- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_labels_are_those_of_the_unfolded_network(
    run_folder: Path, segmenter: Segmenter, size
) -> None:
    image = picture(size)
    [expected] = UnfoldedEngine.open(Run.read(run_folder)).stream([image])
    labels = segmenter(image)
    assert labels.dtype == np.uint8 and labels.shape == size
    # Folding rounds differently; a tie between two classes may fall the other way.
    assert (labels != expected).mean() < 1e-3


def test_the_labels_differ_within_an_image_and_between_images(segmenter: Segmenter) -> None:
    first, second = (segmenter(picture(SIZE, seed)) for seed in (0, 1))
    assert len(np.unique(first)) > 1
    assert (first != second).mean() > 0.1
    assert first.max() < len(CAMVID)


def test_a_run_at_the_size_of_each_image(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", size="image")
    segmenter = Segmenter.load(folder, device="cpu")
    assert segmenter.size is None
    [expected] = UnfoldedEngine.open(Run.read(folder)).stream([picture((49, 70))])
    assert (segmenter(picture((49, 70))) != expected).mean() < 1e-3
    with pytest.raises(ConfigError, match="strict_size"):
        Segmenter.load(folder, device="cpu", strict_size=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_agrees_nearly_everywhere(
    run_folder: Path, segmenter: Segmenter, dtype: str
) -> None:
    half = Segmenter.load(str(run_folder), device="cpu", dtype=dtype)
    image = picture((66, 130))
    assert (half(image) == segmenter(image)).mean() > 0.9


@pytest.mark.parametrize("size", [(33, 65), (50, 70), (5, 9), (64, 1)])
def test_bands_equal_the_whole_map(monkeypatch: pytest.MonkeyPatch, size) -> None:
    logits = torch.randn(1, 19, 9, 17, generator=torch.Generator().manual_seed(0)).double()
    whole = upsample_argmax(logits, size)
    monkeypatch.setattr(argmax, "MOST_VALUES", 19 * size[1] * 4)
    assert torch.equal(argmax_labels(logits, size), whole)


# -- kinds of images ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_every_kind_of_image_gives_the_same_labels(segmenter: Segmenter) -> None:
    image = picture((40, 60))
    expected = segmenter(image)
    read_only = image.copy()
    read_only.setflags(write=False)
    flipped = np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    for same in (read_only, flipped, np.asfortranarray(image), Image.fromarray(image)):
        labels = segmenter(same)
        assert isinstance(labels, np.ndarray) and np.array_equal(labels, expected)
    hwc = torch.from_numpy(image)
    for tensor in (hwc, hwc.permute(2, 0, 1), hwc.permute(2, 0, 1).contiguous()):
        labels = segmenter(tensor)
        assert isinstance(labels, torch.Tensor) and labels.dtype == torch.uint8
        assert np.array_equal(labels.numpy(), expected)


def test_images_are_left_as_they_were(segmenter: Segmenter) -> None:
    image = picture(SIZE)
    before = image.copy()
    segmenter(image)
    segmenter(torch.from_numpy(image))
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32.*uint8"),
        (np.zeros((8, 8, 3), np.uint16), r"uint16.*uint8"),
        (np.zeros((8, 8, 3), bool), r"bool.*uint8"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\).*\(height, width, 3\)"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"\(1, 8, 8, 3\).*one RGB image"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (torch.zeros(8, 8, 3), r"float32.*uint8"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"\(8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"\(1, 3, 8, 8\).*one RGB image"),
        (torch.zeros(3, 8, 3, dtype=torch.uint8), "either side"),
        (torch.zeros(8, 0, 3, dtype=torch.uint8), "no pixels"),
        (Image.new("L", (8, 8)), r"'L'.*convert"),
        (Image.new("RGBA", (8, 8)), r"'RGBA'.*convert"),
        ("street.png", "numpy array, a torch tensor or a PIL image, not a str"),
        (None, "NoneType"),
        ([[[0, 0, 0]]], "list"),
    ],
)
def test_other_images_are_refused(segmenter: Segmenter, image: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        segmenter(image)


def test_a_truncated_file_is_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="decoded"), Image.open(path) as image:
        segmenter(image)


def test_strict_size(run_folder: Path, segmenter: Segmenter) -> None:
    strict = Segmenter.load(run_folder, device="cpu", strict_size=True)
    assert strict.size == SIZE
    assert np.array_equal(strict(picture(SIZE)), segmenter(picture(SIZE)))
    with pytest.raises(DataError, match=r"65x33.*takes 33x65"):
        strict(picture(SIZE[::-1]))


def test_too_large_an_image_is_named(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Segmenter.load(run_folder, device="cpu")

    def exhausted(image: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(segmenter._engine, "labels", exhausted)
    with pytest.raises(DeviceError, match="40x60.*reduce"):
        segmenter(picture((40, 60)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "'int8'.*fp32, fp16, bf16"),
        ({"device": "tpu"}, "'tpu'"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_bad_devices_and_dtypes(run_folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Segmenter.load(run_folder, **({"device": "cpu"} | arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gpu_and_cpu_agree(run_folder: Path, segmenter: Segmenter, dtype: str) -> None:
    on_gpu = Segmenter.load(run_folder, device="cuda", dtype=dtype)
    image = picture((66, 130))
    expected = segmenter(image)
    assert (on_gpu(image) == expected).mean() > 0.97
    labels = on_gpu(torch.from_numpy(image).cuda())
    assert labels.is_cuda and np.array_equal(labels.cpu().numpy(), on_gpu(image))
    assert not on_gpu(torch.from_numpy(image)).is_cuda


# -- servers --------------------------------------------------------------------------------------


def test_threads_share_a_segmenter(segmenter: Segmenter) -> None:
    images = [picture(SIZES[i % len(SIZES)], seed=i) for i in range(40)]
    expected = [segmenter(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(segmenter, images * 2))
    assert all(np.array_equal(*pair) for pair in zip(found, expected * 2, strict=True))


IMPORT = """
import sys, time, torch
start = time.process_time()
from lgcnet_fast.deploy import Segmenter
print(time.process_time() - start)
print(*sys.modules)
"""


def imported() -> tuple[float, str]:
    """Seconds of the import, and the modules that it has brought."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
    )
    seconds, modules = done.stdout.splitlines()
    return float(seconds), modules


def test_the_import_is_light() -> None:
    # Again, where it takes long: other processes may be busy.
    for _ in range(3):
        seconds, modules = imported()
        if seconds < 1:
            break
    ours = {name for name in modules.split() if name.startswith("lgcnet_fast.")}
    data = {name for name in ours if name.startswith("lgcnet_fast.data.")}
    assert not {
        name for name in ours if name.split(".")[1] in ("train", "cli", "report", "latency")
    }
    assert data == {"lgcnet_fast.data.classes", "lgcnet_fast.data.normalise"}
    assert not {"triton", "matplotlib", "tensorboard", "av"} & set(modules.split())
    assert seconds < 1

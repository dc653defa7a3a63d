"""Prediction: odd inputs, output files and their safety, the Cityscapes naming, videos."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.data.classes import CAMVID, CITYSCAPES, ClassSet
from lgcnet_fast.errors import ConfigError, DataError
from lgcnet_fast.train.precision import Precision
from lgcnet_fast.train.predict import predict
from lgcnet_fast.train.predictor import Predictor, UnfoldedEngine


class BrightnessNetwork(nn.Module):
    """Logits at stride 4: class 11 (person) where the input is bright, class 0 where dark."""

    output_stride = 4

    def forward(self, x: Tensor) -> Tensor:
        height, width = (-(-side // 4) for side in x.shape[-2:])
        bright = F.interpolate(x.mean(1, keepdim=True), (height, width))
        logits = torch.full((len(x), 19, height, width), -9.0)
        logits[:, 0:1], logits[:, 11:12] = -bright, bright
        return logits


def make_predictor(
    size: tuple[int, int] | None = None,
    network: nn.Module | None = None,
    classes: ClassSet = CITYSCAPES,
) -> Predictor:
    precision = Precision("fp32", torch.device("cpu"))
    return Predictor(UnfoldedEngine(network or BrightnessNetwork(), size, precision), classes)


def save(path: Path, size: tuple[int, int] = (24, 40), mode: str = "RGB") -> Path:
    """Dark left half, bright right half; `size` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.zeros(size, np.uint8)
    grey[:, size[1] // 2 :] = 255
    Image.fromarray(grey).convert(mode).save(path)
    return path


def run(source: Path, out: Path, form: str = "pictures", **changes: object) -> int:
    return predict(make_predictor(**changes), source, out, form, lambda done, total: None)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# -- pictures -------------------------------------------------------------------------------------


def test_one_image_becomes_three_pictures(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "a.jpg")
    assert run(source, tmp_path / "out") == 1
    assert files(tmp_path / "out") == {"a_labels.png", "a_overlay.png", "a_side_by_side.png"}
    labels = pixels(tmp_path / "out" / "a_labels.png")
    assert (labels[:, :15] == 0).all() and (labels[:, 25:] == 11).all()
    assert pixels(tmp_path / "out" / "a_overlay.png").shape == (24, 40, 3)
    assert pixels(tmp_path / "out" / "a_side_by_side.png").shape[1] >= 80


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_kind_of_image_is_predicted_alike(tmp_path: Path, mode: str) -> None:
    extension = "jpg" if mode == "CMYK" else "png"
    run(save(tmp_path / "in" / f"a.{extension}", mode=mode), tmp_path / "out")
    labels = pixels(tmp_path / "out" / "a_labels.png")
    assert (labels[:, 0] == 0).all() and (labels[:, -1] == 11).all()


def test_folders_keep_their_shape(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "deep" / "er" / "b.JPG")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    assert run(tmp_path / "in", tmp_path / "out") == 2
    made = files(tmp_path / "out")
    assert {"a_labels.png", "deep/er/b_overlay.png"} <= made and len(made) == 6


def test_images_that_differ_in_extension_only_stay_apart(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "a.jpg")
    run(tmp_path / "in", tmp_path / "out")
    assert {"a.png_labels.png", "a.jpg_labels.png"} <= files(tmp_path / "out")


def test_results_below_the_inputs_are_not_read_again(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for _ in range(2):
        assert run(tmp_path, tmp_path / "out") == 1
    assert len(files(tmp_path / "out")) == 3


def test_results_never_lie_between_the_inputs(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "a.png")
    for given in (source, tmp_path / "in"):
        with pytest.raises(DataError, match="another output folder"):
            run(given, tmp_path / "other" / ".." / "in")
    assert files(tmp_path / "in") == {"a.png"}


def test_missing_input_empty_folder_and_file_as_output(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.png: no such file"):
        run(tmp_path / "missing.png", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        run(tmp_path / "empty", tmp_path / "out")
    source = save(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        run(source, tmp_path / "file")


def test_a_damaged_image_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "z.png")
    (tmp_path / "in" / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    with pytest.raises(DataError, match=r"1 of 3 images(.|\n)*m\.png"):
        run(tmp_path / "in", tmp_path / "out")
    assert {"a_labels.png", "z_labels.png"} <= files(tmp_path / "out")


class Exhausted(BrightnessNetwork):
    """Larger images do not fit."""

    def __init__(self, most_pixels: int = 2000) -> None:
        super().__init__()
        self.most_pixels = most_pixels

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0].numel() > self.most_pixels:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(x)


def test_out_of_memory_names_the_image(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "a.png", (50, 60))
    with pytest.raises(DataError, match=r"^[^\n]*a\.png: 50x60"):
        run(source, tmp_path / "out", network=Exhausted())


def test_images_beside_one_that_does_not_fit_are_done(tmp_path: Path) -> None:
    for name, size in (("a", (24, 40)), ("b", (50, 60)), ("c", (24, 40))):
        save(tmp_path / "in" / f"{name}.png", size)
    with pytest.raises(DataError, match=r"1 of 3 images(.|\n)*b\.png: 50x60"):
        run(tmp_path / "in", tmp_path / "out", network=Exhausted())
    assert {name for name in files(tmp_path / "out") if "labels" in name} == {
        "a_labels.png",
        "c_labels.png",
    }


# -- Cityscapes -----------------------------------------------------------------------------------


def test_cityscapes_format_writes_label_ids_under_the_right_names(tmp_path: Path) -> None:
    city = tmp_path / "leftImg8bit" / "test" / "berlin"
    save(city / "berlin_000000_000019_leftImg8bit.png", (64, 128))
    save(city / "berlin_000001_000019_leftImg8bit.png", (64, 128))
    assert run(tmp_path / "leftImg8bit", tmp_path / "out", "cityscapes", size=(33, 65)) == 2
    assert files(tmp_path / "out") == {
        "berlin_000000_000019_pred_labelIds.png",
        "berlin_000001_000019_pred_labelIds.png",
    }
    with Image.open(tmp_path / "out" / "berlin_000000_000019_pred_labelIds.png") as image:
        assert image.mode == "L" and image.size == (128, 64)
        ids = np.asarray(image)
    assert set(np.unique(ids)) == {7, 24}


def test_cityscapes_format_refuses_other_names_and_classes(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "a.png")
    with pytest.raises(DataError, match="CITY_SEQ_FRAME_leftImg8bit"):
        run(source, tmp_path / "out", "cityscapes")
    with pytest.raises(ConfigError, match="'camvid'"):
        run(source, tmp_path / "out", "cityscapes", classes=CAMVID)
    assert not (tmp_path / "out").exists()


def test_cityscapes_format_refuses_a_frame_twice(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save(tmp_path / "in" / folder / "berlin_000000_000019_leftImg8bit.png")
    with pytest.raises(DataError, match="same frame twice"):
        run(tmp_path / "in", tmp_path / "out", "cityscapes")


# -- videos ---------------------------------------------------------------------------------------


@pytest.fixture
def video(tmp_path: Path) -> Path:
    pytest.importorskip("av", reason="the extra video is not installed")
    from lgcnet_fast.report.video import VideoWriter

    path = tmp_path / "in" / "clip.mp4"
    path.parent.mkdir()
    frame = np.zeros((31, 45, 3), np.uint8)
    frame[:, 22:] = 255
    with VideoWriter(path, Fraction(12)) as writer:
        for _ in range(5):
            writer.write(frame)
    return path


def test_a_video_becomes_two_videos_and_labels(tmp_path: Path, video: Path) -> None:
    from lgcnet_fast.report.video import frame_rate, read_frames

    out = tmp_path / "out"
    assert run(video, out) == 5
    labels = {f"clip_labels/{index:06}.png" for index in range(5)}
    assert files(out) == {"clip_overlay.mp4", "clip_side_by_side.mp4"} | labels
    assert frame_rate(out / "clip_overlay.mp4") == 12
    assert len(list(read_frames(out / "clip_side_by_side.mp4"))) == 5
    assert (pixels(out / "clip_labels" / "000004.png")[:, -5:] == 11).all()


def test_videos_are_refused_where_they_cannot_work(tmp_path: Path, video: Path) -> None:
    with pytest.raises(ConfigError, match="not a video"):
        run(video, tmp_path / "out", "cityscapes")
    with pytest.raises(DataError, match="another output folder"):
        run(video, video.parent)


def test_frames_that_do_not_fit_name_the_video(tmp_path: Path, video: Path) -> None:
    with pytest.raises(DataError, match=r"clip\.mp4: 32x46 pixels"):
        run(video, tmp_path / "out", network=Exhausted(most_pixels=1000))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:200], lambda data: b"x"])
def test_damaged_videos_name_the_file(
    tmp_path: Path, video: Path, damage: Callable[[bytes], bytes]
) -> None:
    video.write_bytes(damage(video.read_bytes()))
    with pytest.raises(DataError, match=r"clip\.mp4: not a readable video"):
        run(video, tmp_path / "out")


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"lgcnet_fast\[video\]"):
        run(tmp_path / "clip.mp4", tmp_path / "out")

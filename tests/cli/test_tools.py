"""predict, lut, data and doctor as a user types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgcnet_fast.ops.backend import set_backend
from tests.cli.conftest import call, call_well, refusal


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos" / "berlin"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    for frame in range(2):
        Image.fromarray(noise).save(folder / f"berlin_00000{frame}_000019_leftImg8bit.png")
    return folder


# -- predict --------------------------------------------------------------------------------------


def test_predict_a_folder(finished_run: Path, photos: Path, tmp_path: Path) -> None:
    shown = call_well("predict", finished_run, photos.parent, "--out", tmp_path / "out").out
    assert "2 predicted" in shown
    assert len(list((tmp_path / "out" / "berlin").glob("*.png"))) == 6


def test_predict_for_the_cityscapes_server(
    finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = ("--out", tmp_path / "out", "--format", "cityscapes")
    call_well("predict", finished_run, photos, *arguments)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"berlin_00000{frame}_000019_pred_labelIds.png" for frame in range(2)]
    with Image.open(tmp_path / "out" / names[0]) as image:
        assert image.size == (70, 40)
        assert set(np.unique(np.asarray(image))) <= {7, 8, 11, 12, 13, 17, *range(19, 34)}


def test_predict_a_video(finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    from lgcnet_fast.report.video import VideoWriter

    video = tmp_path / "in" / "clip.mp4"
    video.parent.mkdir()
    with VideoWriter(video, Fraction(10)) as writer:
        for brightness in (0, 100, 200):
            writer.write(np.full((36, 64, 3), brightness, np.uint8))
    assert "3 predicted" in call_well("predict", finished_run, video, "--out", tmp_path / "o").out
    assert (tmp_path / "o" / "clip_overlay.mp4").stat().st_size > 0


def test_predict_needs_no_data_set(copied_run: Path, photos: Path, tmp_path: Path) -> None:
    stored = json.loads((copied_run / "config.json").read_text())
    stored["data"] |= {"name": "camvid", "root": str(tmp_path / "gone")}
    (copied_run / "config.json").write_text(json.dumps(stored))
    call_well("predict", copied_run, photos, "--out", tmp_path / "out")


def test_the_help_names_the_formats_that_there_are() -> None:
    from lgcnet_fast.cli import predict as command
    from lgcnet_fast.train.predict import FORMATS

    assert command.FORMATS == FORMATS


def test_predict_leaves_the_run_as_it_is(finished_run: Path, photos: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    call_well("predict", finished_run, photos, "--out", tmp_path / "out", "--device", "cpu")
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before
    assert "gpu" in refusal("predict", finished_run, photos, "--out", tmp_path, "--device", "gpu")


def test_predict_mistakes(finished_run: Path, photos: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "missing.png" in refusal("predict", finished_run, tmp_path / "missing.png", *out)
    assert "not a run folder" in refusal("predict", photos, photos, *out)
    assert "pictures" in refusal("predict", finished_run, photos, *out, "--format", "picture")
    assert "another output" in refusal("predict", finished_run, photos, "--out", photos)
    (photos / "bad.png").write_bytes(b"bad")
    assert "bad.png" in refusal("predict", finished_run, photos / "bad.png", *out)


@pytest.fixture
def backend_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    set_backend("auto")


@pytest.mark.usefixtures("backend_restored")
def test_predict_with_another_dtype_and_backend(
    finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out", "--device", "cpu")
    call_well("predict", finished_run, photos, *out, "--dtype", "bf16", "--backend", "reference")
    assert "--dtype int8" in refusal("predict", finished_run, photos, *out, "--dtype", "int8")
    for backend, message in (("triton", "cannot serve here"), ("cudnn", "unknown backend")):
        assert message in refusal("predict", finished_run, photos, *out, "--backend", backend)


def test_predict_before_training_names_the_stage(config: Path, photos: Path) -> None:
    run = config.parent / "new"
    random = ("--set", "search.strategy=random")
    call_well("search", config, "--preset", "smoke", "--out", run, *random)
    assert "derive first" in refusal("predict", run, photos, "--out", config.parent / "out")
    call_well("derive", run)
    assert "finetune first" in refusal("predict", run, photos, "--out", config.parent / "out")


# -- lut ------------------------------------------------------------------------------------------


def test_a_built_table_can_be_shown_and_used(config: Path) -> None:
    table = config.parent / "table.json"
    roofline = ("--runtime", "roofline")
    call_well("lut", "build", config, "--preset", "smoke", "--out", table, *roofline)
    shown = call_well("lut", "show", table).out
    assert "TITAN Xp" in shown and "49x97" in shown and "cell.sep3" in shown
    use = ("--set", f"latency.table={table}", "--set", "search.strategy=random")
    call_well("search", config, "--preset", "smoke", "--out", config.parent / "run", *use)
    size = ("--set", "latency.size=[65, 129]")
    other = refusal(
        "search", config, "--preset", "smoke", "--out", config.parent / "b", *use, *size
    )
    assert "65x129" in other


def test_lut_mistakes(config: Path) -> None:
    out = ("--out", config.parent / "table.json")
    build = ("lut", "build", config, "--preset", "smoke", *out)
    assert "did you mean 'roofline'" in refusal(*build, "--runtime", "rooflin")
    assert "space.cels" in refusal(*build, "--set", "space.cels=3")
    assert refusal(*build, "--classes", "0")
    assert "missing.json" in refusal("lut", "show", config.parent / "missing.json")
    assert "tiny.toml" in refusal("lut", "show", config)
    assert not (config.parent / "table.json").exists()


# -- data -----------------------------------------------------------------------------------------


def test_data_check_prints_shares(config: Path) -> None:
    shown = call_well("data", "check", config, "--preset", "smoke").out
    assert "8 images" in shown and "bicycle" in shown and "no problems" in shown


def test_data_check_names_problems(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / split / "a.jpg")
        Image.new("L", (8, 6), 7 if split == "val" else 0).save(tmp_path / split / "a.png")
    splits = "".join(
        f'[splits.{split}]\nimages = "{split}/*.jpg"\nlabels = "{split}/*.png"\n'
        for split in ("train", "val")
    )
    classes = '[[classes]]\nname = "ground"\ncolour = [1, 2, 3]\n'
    (tmp_path / "dataset.toml").write_text(f'name = "tiny"\n{splits}{classes}')
    check = ("data", "check", "--set", "data.name=folder", "--set", f"data.root={tmp_path}")
    result = call(*check)
    assert result.status == 1
    assert "val/a.png" in result.out and "2 problems" in result.out
    (tmp_path / "dataset.toml").write_text("name = ")
    result = call(*check)
    assert result.status == 1 and "dataset.toml" in result.out


def test_data_show_draws_a_sheet(config: Path) -> None:
    sheet = config.parent / "new" / "sheet.png"
    call_well("data", "show", config, "--preset", "smoke", "--count", "3", "--out", sheet)
    with Image.open(sheet) as image:
        assert image.width >= 2 * 320


def test_data_mistakes(config: Path) -> None:
    assert "serch" in refusal("data", "check", config, "--set", "serch.epochs=1")
    assert "exam" in refusal("data", "show", config, "--preset", "smoke", "--split", "exam")
    assert "is a folder" in refusal("data", "show", config, "--out", config.parent)
    assert "nowhere" in refusal("data", "show", "--set", "data.name=camvid",
                                "--set", "data.root=nowhere")  # fmt: skip


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor_prints_findings() -> None:
    result = call("doctor")
    assert result.status in (0, 1)
    assert "torch" in result.out and "Python" in result.out
    assert all(f"backend {name}" in result.out for name in ("triton", "cuda", "reference"))


def test_doctor_keeps_brackets_in_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    from lgcnet_fast import doctor

    found = [doctor.Finding("av", "fail", "not installed", "pip install 'lgcnet_fast[video]'")]
    monkeypatch.setattr(doctor, "diagnose", lambda folder: found)
    result = call("doctor")
    assert result.status == 1 and "lgcnet_fast[video]" in result.out

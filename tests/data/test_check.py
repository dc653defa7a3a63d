from __future__ import annotations

import shutil

import numpy as np
import pytest

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data.check import check_dataset


@pytest.fixture
def config(camvid_root):
    return DataConfig(name="camvid", root=camvid_root)


def test_a_sound_set(config):
    report = check_dataset(config)
    assert report.ok and report.classes.name == "camvid"
    assert [(s.split, s.images) for s in report.splits] == [("train", 3), ("val", 2)]
    train = report.splits[0]
    assert train.pixels.sum() + train.ignored == 2 * 12 * 16 + 10 * 14
    assert train.shares.sum() + train.ignored_share == pytest.approx(1)


def test_every_problem_is_reported(config, save):
    root = config.root
    (root / "train" / "train0.png").write_bytes(b"no image")
    save(root / "trainannot" / "train1.png", np.full((10, 14), 40, np.uint8))
    save(root / "trainannot" / "train2.png", np.zeros((3, 3), np.uint8))
    (root / "valannot" / "val0.png").unlink()
    report = check_dataset(config)
    found = {
        problem.file.rsplit("/", 2)[-2] + "/" + problem.file.rsplit("/", 1)[-1]: problem.fault
        for problem in report.problems
    }
    assert set(found) == {
        "train/train0.png",
        "trainannot/train1.png",
        "trainannot/train2.png",
        "valannot/val0.png",
    }
    assert "not a readable image" in found["train/train0.png"]
    assert "unknown id 40 (140 pixels)" in found["trainannot/train1.png"]
    assert "3x3" in found["trainannot/train2.png"]
    assert all(problem.remedy for problem in report.problems)
    assert report.splits[1].images == 2


def test_an_image_in_two_splits(config):
    root = config.root
    shutil.copy(root / "train" / "train0.png", root / "val" / "val0.png")
    (problem,) = check_dataset(config).problems
    assert problem.file == str(root / "val" / "val0.png")
    assert "the same image in split 'val'" in problem.fault and "train0.png" in problem.fault


def test_the_same_image_stored_differently(config, save):
    root = config.root
    pixels = np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8)
    save(root / "train" / "train0.png", pixels)
    save(root / "val" / "val0.png", pixels, compress_level=0)
    assert len(check_dataset(config).problems) == 1


def test_one_file_in_two_training_splits_is_no_mistake(config):
    root = config.root
    shutil.copy(root / "train.txt", root / "again.txt")
    splits = {"train_splits": ("train", "again")}
    assert check_dataset(config.model_copy(update=splits)).ok
    report = check_dataset(config.model_copy(update={"val_split": "again"}))
    assert len(report.problems) == 3


def test_a_split_that_cannot_be_opened(config):
    (config.root / "train.txt").write_text("")
    report = check_dataset(config)
    assert [s.split for s in report.splits] == ["val"]
    (problem,) = report.problems
    assert problem.file.endswith("train.txt") and problem.remedy


def test_no_folder(config, tmp_path):
    report = check_dataset(config.model_copy(update={"root": tmp_path / "nowhere"}))
    assert report.classes is None and not report.splits and len(report.problems) == 2


def test_synthetic_streets_are_sound():
    assert check_dataset(DataConfig(synthetic_images=4, synthetic_size=(32, 64))).ok


def test_real_camvid(real_data):
    config = DataConfig(name="camvid", root=real_data / "camvid", train_splits=("val",))
    report = check_dataset(config)
    assert report.ok and report.splits[0].shares[3] > 0.2

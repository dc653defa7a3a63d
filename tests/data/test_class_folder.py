from __future__ import annotations

import numpy as np
import pytest

from lgcnet_fast.config import PretrainConfig
from lgcnet_fast.data.class_folder import open_class_folder, open_classes
from lgcnet_fast.errors import DataError


@pytest.fixture
def root(tmp_path, save):
    for split, names in (("train", ("zebra", "ant")), ("val", ("zebra",))):
        for name in names:
            for index in range(2):
                save(tmp_path / split / name / f"{index}.png", np.full((5, 5, 3), index, np.uint8))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


def test_classes_are_sorted_and_shared_by_the_splits(root):
    train, val = open_class_folder(root, "train"), open_class_folder(root, "val")
    assert train.classes == val.classes == ("ant", "zebra")
    assert [train.target(i) for i in range(len(train))] == [0, 0, 1, 1]
    assert [val.target(i) for i in range(len(val))] == [1, 1]
    assert train.image(1).max() == 1


def test_faulty_folders(root, tmp_path, save):
    with pytest.raises(DataError, match="no split 'test'"):
        open_class_folder(root, "test")
    with pytest.raises(DataError, match="train/CLASS/IMAGE"):
        open_class_folder(tmp_path / "nowhere", "train")
    save(root / "val" / "bee" / "0.png", np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(DataError, match="class 'bee' is not in"):
        open_class_folder(root, "val")


def test_no_images(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no class folder"):
        open_class_folder(tmp_path, "train")
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(DataError, match="no CLASS/IMAGE"):
        open_class_folder(tmp_path, "train")


def test_fingerprint_follows_the_files(root, save):
    dataset = open_class_folder(root, "train")
    before = dataset.fingerprint()
    save(root / "train" / "ant" / "0.png", np.zeros((7, 7, 3), np.uint8))
    after = open_class_folder(root, "train")
    assert after.fingerprint() != before
    assert after.identity() == dataset.identity()


def test_synthetic_classes_by_default():
    train = open_classes(PretrainConfig(synthetic_images=8), "train", 32)
    val = open_classes(PretrainConfig(synthetic_images=8), "val", 32)
    assert (len(train), len(val)) == (8, 2) and train.classes == val.classes
    assert train.image(0).shape == (32, 32, 3)
    assert train.fingerprint() != val.fingerprint()
    with pytest.raises(DataError, match="no split 'test'"):
        open_classes(PretrainConfig(), "test", 32)


def test_real_caltech(real_data):
    val = open_class_folder(real_data / "caltech101", "val")
    assert (len(val), len(val.classes)) == (835, 101)

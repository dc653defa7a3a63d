from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data.camvid import open_camvid, open_camvid_original
from lgcnet_fast.data.cityscapes import open_cityscapes
from lgcnet_fast.data.classes import CAMVID
from lgcnet_fast.data.dataset import image_and_label, open_dataset
from lgcnet_fast.data.lists import read_list
from lgcnet_fast.errors import DataError


@pytest.fixture
def cityscapes_root(tmp_path, save):
    """Two images of `train` with fine and coarse labels, one of `train_extra`."""
    root = tmp_path / "cityscapes"
    frames = {"train": ("aachen_000000_000019", "ulm_000001_000019"), "train_extra": ("bonn_0_0",)}
    for folder, stems in frames.items():
        for stem in stems:
            city = stem.split("_")[0]
            pixels = np.full((4, 8, 3), len(stem), np.uint8)
            save(root / "leftImg8bit" / folder / city / f"{stem}_leftImg8bit.png", pixels)
            for package, raw in (("gtFine", 7), ("gtCoarse", 26)):
                if folder == "train" or package == "gtCoarse":
                    name = f"{stem}_{package}_labelIds.png"
                    save(root / package / folder / city / name, np.full((4, 8), raw, np.uint8))
    return root


@pytest.mark.parametrize(
    ("split", "images", "train_id"),
    [("train", 2, 0), ("train_coarse", 2, 13), ("train_extra_coarse", 1, 13)],
)
def test_cityscapes_as_downloaded(cityscapes_root, split, images, train_id):
    dataset = open_cityscapes(cityscapes_root, split)
    assert len(dataset) == images and dataset.split == split
    image, label = image_and_label(dataset, 0)
    assert image.shape == (4, 8, 3) and (label == train_id).all()
    assert "leftImg8bit" not in dataset.stem(0)


def test_cityscapes_stems_carry_city_sequence_and_frame(cityscapes_root):
    assert open_cityscapes(cityscapes_root, "train").stem(0) == "aachen_000000_000019"


def test_cityscapes_faults(cityscapes_root):
    with pytest.raises(DataError, match="no split 'fine'; the splits are train, val"):
        open_cityscapes(cityscapes_root, "fine")
    with pytest.raises(DataError, match="val: no such folder; unpack leftImg8bit"):
        open_cityscapes(cityscapes_root, "val")
    (cityscapes_root / "leftImg8bit" / "val").mkdir()
    with pytest.raises(DataError, match="unpack gtFine"):
        open_cityscapes(cityscapes_root, "val")
    (cityscapes_root / "gtFine" / "val").mkdir()
    with pytest.raises(DataError, match="no CITY"):
        open_cityscapes(cityscapes_root, "val")


def test_missing_label_file_is_named(cityscapes_root):
    dataset = open_cityscapes(cityscapes_root, "train")
    dataset.label_path(1).unlink()
    with pytest.raises(DataError, match="ulm_000001_000019_gtFine_labelIds.png: no such file"):
        dataset.label(1)
    with pytest.raises(DataError, match="ulm_000001_000019_gtFine_labelIds.png: no such file"):
        dataset.fingerprint()


def test_camvid_segnet_layout(camvid_root):
    dataset = open_camvid(camvid_root, "train")
    assert len(dataset) == 3 and dataset.stem(2) == "train2" and dataset.classes is CAMVID
    image, label = image_and_label(dataset, 1)
    assert image.shape == (10, 14, 3)
    assert set(np.unique(label)) <= {*range(11), 255} and 255 in label


def test_camvid_lists_as_published_by_segnet(camvid_root):
    listed = camvid_root / "train.txt"
    listed.write_text("/SegNet/CamVid/train/train0.png /SegNet/CamVid/trainannot/train0.png\n")
    assert open_camvid(camvid_root, "train").image(0).shape == (12, 16, 3)


def test_camvid_lists_with_absolute_paths(camvid_root):
    image, label = camvid_root / "val/val0.png", camvid_root / "valannot/val0.png"
    (camvid_root / "train.txt").write_text(f"\n  {image}\t{label} \n\n")
    assert open_camvid(camvid_root, "train").image_path(0) == image


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no entry"),
        (b"\n \n", "no entry"),
        (b"one.png\n", "line 1 is 'one.png'; write it as IMAGE LABEL"),
        (b"a.png b.png\na.png b.png c.png\n", "line 2"),
        (b"a.png b.png\nx/a.jpg b.png\n", "'a' is listed twice"),
        (b"\xff\xfe\x00\x81", "cannot be read"),
        (b"a.png b\0.png\n", "line 1"),
    ],
)
def test_malformed_lists(camvid_root, content, message):
    (camvid_root / "train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        open_camvid(camvid_root, "train")
    assert "train.txt" in str(raised.value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=120))
def test_any_list_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "list.txt"
    path.write_bytes(content)
    try:
        assert all(len(row) == 2 for row in read_list(path, columns=2))
    except DataError as error:
        assert str(path) in str(error)


def test_unknown_camvid_split(camvid_root, tmp_path):
    with pytest.raises(DataError, match="no split 'test'; the splits are train, val"):
        open_camvid(camvid_root, "test")
    with pytest.raises(DataError, match="no such list file"):
        open_camvid(tmp_path, "train")


def test_sizes_must_agree(camvid_root, save):
    save(camvid_root / "trainannot" / "train0.png", np.zeros((12, 15), np.uint8))
    with pytest.raises(DataError, match=r"train0\.png: label is 12x15 but its image is 12x16"):
        image_and_label(open_camvid(camvid_root, "train"), 0)


@pytest.mark.parametrize(
    "folders", [("701_StillsRaw_full", "LabeledApproved_full"), ("images", "labels")]
)
def test_camvid_original_layout(tmp_path, save, folders):
    colours = np.array([[[128, 64, 128], [192, 0, 64], [0, 0, 0]]], np.uint8)
    save(tmp_path / folders[0] / "0001TP_006690.png", colours)
    save(tmp_path / folders[1] / "0001TP_006690_L.png", colours)
    (tmp_path / "val.txt").write_text("0001TP_006690.png\n")
    dataset = open_camvid_original(tmp_path, "val")
    assert dataset.label(0).tolist() == [[3, 3, 255]]  # Road, LaneMkgsNonDriv, Void
    assert dataset.image(0).shape == (1, 3, 3)


def test_camvid_original_needs_its_folders(tmp_path):
    with pytest.raises(DataError, match="no folder 701_StillsRaw_full or images"):
        open_camvid_original(tmp_path, "train")


def test_open_dataset_dispatches(camvid_root, tmp_path):
    assert open_dataset(DataConfig(name="camvid", root=camvid_root), "val").name == "camvid"
    with pytest.raises(DataError, match="set data.root"):
        open_dataset(DataConfig(name="camvid", root=tmp_path / "nowhere"), "val")


def test_synthetic_splits():
    config = DataConfig(synthetic_images=8, synthetic_size=(32, 64))
    assert len(open_dataset(config, "train")) == 8
    assert len(open_dataset(config, "val")) == 2
    with pytest.raises(DataError, match="no split 'test'; the splits are train, val"):
        open_dataset(config, "test")


def test_fingerprint_follows_the_files(camvid_root, save):
    dataset = open_camvid(camvid_root, "train")
    before = dataset.fingerprint()
    assert open_camvid(camvid_root, "train").fingerprint() == before
    save(camvid_root / "train" / "train0.png", np.zeros((12, 16, 3), np.uint8))
    after = open_camvid(camvid_root, "train")
    assert after.fingerprint() != before
    assert after.identity() == dataset.identity()
    assert open_camvid(camvid_root, "val").identity() != dataset.identity()


def test_real_camvid(real_data):
    sizes = {split: len(open_camvid(real_data / "camvid", split)) for split in ("train", "val")}
    assert sizes == {"train": 367, "val": 101}

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgcnet_fast.data.folder import open_folder
from lgcnet_fast.errors import DataError

DESCRIPTION = """
name = "orchard"
ignore = [255]

[splits.train]
images = "images/*/*.jpg"
labels = "masks/*/*_mask.png"

[[classes]]
name = "tree"
colour = [0, 128, 0]
ids = [1, 4]

[[classes]]
name = "ground"
colour = [90, 60, 30]
ids = [2]
"""


@pytest.fixture
def root(tmp_path, save):
    for day, value in (("mon", 1), ("tue", 4)):
        save(tmp_path / "images" / day / "0.jpg", np.zeros((4, 6, 3), np.uint8))
        label = np.full((4, 6), value, np.uint8)
        label[0], label[1] = 255, 2
        save(tmp_path / "masks" / day / "0_mask.png", label)
    (tmp_path / "dataset.toml").write_text(DESCRIPTION)
    return tmp_path


def test_stars_pair_images_and_masks(root):
    dataset = open_folder(root, "train")
    assert len(dataset) == 2
    assert dataset.name == "orchard" and dataset.classes.names == ("tree", "ground")
    assert dataset.classes.output_ids == (1, 2)
    assert dataset.label_path(1) == root / "masks" / "tue" / "0_mask.png"
    assert dataset.label(1)[:3, 0].tolist() == [255, 1, 0]


def test_stems_are_unique(root):
    dataset = open_folder(root, "train")
    assert [dataset.stem(i) for i in range(2)] == ["images_mon_0", "images_tue_0"]


def test_ids_default_to_the_order_of_classes(root):
    text = DESCRIPTION.replace("ids = [1, 4]", "").replace("ids = [2]", "")
    (root / "dataset.toml").write_text(text)
    with pytest.raises(DataError, match=r"unknown id 2 \(6 pixels\), id 4 \(12 pixels\)"):
        open_folder(root, "train").label(1)


def test_colour_masks(root, save):
    text = DESCRIPTION.replace("ids = [1, 4]", "").replace("ids = [2]", "")
    text = text.replace("ignore = [255]", 'encoding = "colours"\nignore = [[255, 255, 255]]')
    (root / "dataset.toml").write_text(text)
    pixels = np.array([[[0, 128, 0], [90, 60, 30], [255, 255, 255]]], np.uint8)
    save(root / "masks" / "mon" / "0_mask.png", pixels)
    assert open_folder(root, "train").label(0).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "orchard"', 'naem = "orchard"', "unknown key 'naem'; did you mean 'name'"),
        ("colour = [0, 128, 0]", "colour = [0, 128]", "colour"),
        ("colour = [0, 128, 0]", "colour = [0, 128, 256]", "colour"),
        ("ids = [2]", "ids = [4]", "mask value 4 is given 2 times"),
        ("ids = [2]", "ids = [255]", "mask value 255 is given 2 times"),
        ("ids = [2]", "ids = []", "ids"),
        ("ids = [2]", "ids = [70000]", "ids"),
        ('name = "ground"', 'name = "tree"', "class name 'tree' is given 2 times"),
        ("ignore = [255]", "ignore = [[0, 0, 0]]", "ignore must list ids"),
        ("ignore = [255]", 'encoding = "colours"', 'ids of classes need encoding = "ids"'),
        ('"masks/*/*_mask.png"', '"masks/*_mask.png"', "same number of stars"),
        ('"images/*/*.jpg"', '"images/**/*.jpg"', "neither"),
        ('"images/*/*.jpg"', '"../images/*/*.jpg"', "neither"),
        ('"images/*/*.jpg"', '"/images/*/*.jpg"', "splits.train.images"),
        ('"images/*/*.jpg"', '"images/*/*.png"', "no file matches 'images/*/*.png'"),
        ("[splits.train]", "[splits.val]", "no split 'train'; the splits are val"),
        ("[splits.train]", "[splits.train", "not valid TOML"),
    ],
)
def test_faulty_descriptions(root, old, new, message):
    assert old in DESCRIPTION
    (root / "dataset.toml").write_text(DESCRIPTION.replace(old, new))
    with pytest.raises(DataError) as raised:
        open_folder(root, "train")
    assert "dataset.toml" in str(raised.value) and message in str(raised.value)


def test_missing_description(tmp_path):
    with pytest.raises(DataError, match="dataset.toml: no such file; describe"):
        open_folder(tmp_path, "train")


TOKENS = st.sampled_from(
    ["[", "]", "=", '"', "[[classes]]", "name", "\n", "splits", "*", "1", "{", "}", ",", "ids"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(TOKENS, max_size=30).map(lambda tokens: "".join(tokens).encode()),
        st.integers(0, len(DESCRIPTION)).map(lambda end: DESCRIPTION[:end].encode()),
        st.integers(1, 5000).map(lambda depth: b"a = " + b"[" * depth),
    )
)
def test_any_description_is_read_or_refused(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp()
    (root / "dataset.toml").write_bytes(content)
    with pytest.raises(DataError, match="dataset.toml"):
        open_folder(root, "train")

"""Pictures: colours are the class colours, ignored pixels stay visible, files are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgcnet_fast.data.classes import CAMVID, CITYSCAPES, IGNORE
from lgcnet_fast.report.pictures import (
    colourise,
    contact_sheet,
    label_picture,
    legend,
    overlay,
    save_picture,
    side_by_side,
)


@pytest.fixture
def labels() -> np.ndarray:
    ids = np.arange(20, dtype=np.uint8).reshape(4, 5)
    ids[ids == 19] = IGNORE
    return ids


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def test_colourise_uses_the_class_colours(labels: np.ndarray) -> None:
    colours = colourise(labels, CITYSCAPES)
    assert tuple(colours[0, 0]) == (128, 64, 128)
    assert tuple(colours[3, 3]) == (119, 11, 32)
    assert tuple(colours[3, 4]) == (0, 0, 0)


def test_overlay_is_the_mean_and_leaves_ignored_pixels(
    image: np.ndarray, labels: np.ndarray
) -> None:
    mixed = overlay(image, labels, CITYSCAPES)
    assert mixed.dtype == np.uint8
    expected = (image[0, 0].astype(int) + CITYSCAPES.colours[0]) // 2
    assert (mixed[0, 0] == expected).all()
    assert (mixed[3, 4] == image[3, 4]).all()


def test_label_picture_stores_ids_and_shows_colours(tmp_path: Path, labels: np.ndarray) -> None:
    save_picture(tmp_path / "label.png", label_picture(labels, CITYSCAPES))
    with Image.open(tmp_path / "label.png") as stored:
        assert (np.asarray(stored) == labels).all()
        assert (np.asarray(stored.convert("RGB")) == colourise(labels, CITYSCAPES)).all()


def test_side_by_side_keeps_the_pictures(image: np.ndarray) -> None:
    row = side_by_side([image, 255 - image])
    assert (row[:, :5] == image).all() and (row[:, -5:] == 255 - image).all()


@pytest.mark.parametrize("width", [10, 200, 2000])
def test_legend_shows_every_class_colour_once(width: int) -> None:
    drawn = legend(CAMVID, width)
    assert drawn.shape[1] >= width
    colours = {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in CAMVID.colours.tolist()} <= colours


@pytest.mark.parametrize("size", [(4, 5), (60, 3), (3, 700)])
def test_contact_sheet_takes_any_size(size: tuple[int, int]) -> None:
    image, labels = np.zeros((*size, 3), np.uint8), np.full(size, 3, np.uint8)
    samples = [("a", image, (labels, labels)), ("b" * 99, image, (labels, labels))]
    sheet = contact_sheet(samples, CAMVID, ("image", "label", "prediction"))
    assert sheet.shape[1] >= 3 * 320 and sheet.dtype == np.uint8


def test_contact_sheet_needs_samples() -> None:
    with pytest.raises(ValueError):
        contact_sheet([], CAMVID, ("image",))


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path, image: np.ndarray) -> None:
    path = tmp_path / "picture.png"
    path.write_text("old")
    save_picture(path, image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]
    with Image.open(path) as stored:
        assert (np.asarray(stored) == image).all()

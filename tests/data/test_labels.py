from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lgcnet_fast.data.classes import (
    CAMVID,
    CAMVID_ORIGINAL,
    CITYSCAPES,
    CITYSCAPES_LABEL_IDS,
    camvid_colour_ids,
)
from lgcnet_fast.data.labels import ColourLabels, IdLabels, ids_of
from lgcnet_fast.errors import DataError


def test_class_sets():
    assert len(CITYSCAPES) == len(CITYSCAPES.output_ids) == 19
    assert CITYSCAPES.names[0] == "road" and CITYSCAPES.output_ids[0] == 7
    assert CITYSCAPES.names[18] == "bicycle" and CITYSCAPES.output_ids[18] == 33
    assert len(CAMVID) == 11 and CAMVID.output_ids == tuple(range(11))
    for classes in (CITYSCAPES, CAMVID):
        assert len({tuple(c) for c in classes.colours.tolist()}) == len(classes)
        assert (classes.palette()[: len(classes)] == classes.colours).all()


def test_camvid_merges_31_of_32_classes():
    assert list(CAMVID_ORIGINAL) == list(CAMVID.names)
    assert sum(map(len, CAMVID_ORIGINAL.values())) == 31
    ids = camvid_colour_ids()
    assert len(ids) == 32 and ids[(0, 0, 0)] == 255
    assert ids[(192, 128, 192)] == CAMVID.names.index("Car")  # Truck_Bus


def test_cityscapes_label_ids_become_train_ids(tmp_path, save):
    raw = np.arange(34, dtype=np.uint8).reshape(2, 17)
    train = IdLabels(ids_of(CITYSCAPES.output_ids, CITYSCAPES_LABEL_IDS))(
        save(tmp_path / "a.png", raw)
    )
    assert train.dtype == np.uint8
    for train_id, raw_id in enumerate(CITYSCAPES.output_ids):
        assert train.ravel()[raw_id] == train_id
    assert (train == 255).sum() == 34 - 19


@pytest.mark.parametrize(
    ("name", "dtype", "odd"),
    [("a.png", np.uint8, 77), ("a.png", np.uint16, 65535), ("a.tif", np.int32, -3)],
)
def test_odd_ids_are_named_and_counted(tmp_path, save, name, dtype, odd):
    raw = np.zeros((4, 4), dtype)
    raw[1, 1:] = odd
    with pytest.raises(DataError, match=rf"{name}: unknown id {odd} \(3 pixels\).*0-2, 9"):
        IdLabels({0: 0, 1: 1, 2: 2, 9: 255})(save(tmp_path / name, raw))


def test_many_odd_ids_are_summed_up(tmp_path, save):
    raw = np.arange(10, dtype=np.uint8).reshape(2, 5)
    with pytest.raises(DataError, match="and 4 more"):
        IdLabels({0: 0})(save(tmp_path / "a.png", raw))


def test_colours(tmp_path, save):
    colours = np.array([[[1, 2, 3], [0, 0, 0]], [[255, 0, 9], [1, 2, 3]]], np.uint8)
    labels = ColourLabels({(255, 0, 9): 1, (1, 2, 3): 0, (0, 0, 0): 255})
    result = labels(save(tmp_path / "a.png", colours))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, [[0, 255], [1, 0]])


def test_odd_colours_are_named_and_counted(tmp_path, save):
    colours = np.full((2, 3, 3), 200, np.uint8)
    with pytest.raises(DataError, match=r"unknown colour \(200, 200, 200\) \(6 pixels\)"):
        ColourLabels({(1, 2, 3): 0})(save(tmp_path / "a.png", colours))


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.integers(0, 65535), st.integers(0, 255), min_size=1, max_size=20),
    st.lists(st.integers(0, 65535), min_size=1, max_size=30),
)
def test_ids_map_exactly_or_are_refused(tmp_path_factory, mapping, raw):
    path = tmp_path_factory.getbasetemp() / "ids.png"
    Image.fromarray(np.array([raw], np.uint16)).save(path)
    if set(raw) <= set(mapping):
        assert IdLabels(mapping)(path).tolist() == [[mapping[value] for value in raw]]
    else:
        with pytest.raises(DataError, match="unknown id"):
            IdLabels(mapping)(path)

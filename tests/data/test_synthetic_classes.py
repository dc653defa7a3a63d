"""The built-in pictures for pretraining."""

import numpy as np
import pytest

from lgcnet_fast.data.synthetic_classes import SyntheticClasses
from lgcnet_fast.errors import DataError


def test_pictures_and_targets():
    pictures = SyntheticClasses("train", 45, 48, 0)
    assert len(pictures) == 45
    assert len(set(pictures.classes)) == len(pictures.classes) >= 12
    for i in range(45):
        image = pictures.image(i)
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8
    targets = [pictures.target(i) for i in range(45)]
    assert np.bincount(targets).min() == 45 // len(pictures.classes)


def test_a_picture_is_a_function_of_seed_split_and_index():
    first = SyntheticClasses("train", 5, 40, 0)
    assert np.array_equal(first.image(4), SyntheticClasses("train", 9, 40, 0).image(4))
    assert not np.array_equal(first.image(4), SyntheticClasses("val", 5, 40, 0).image(4))
    assert not np.array_equal(first.image(4), SyntheticClasses("train", 5, 40, 1).image(4))


def test_pictures_of_a_class_differ():
    pictures = SyntheticClasses("train", 60, 32, 0)
    classes = len(pictures.classes)
    assert not np.array_equal(pictures.image(0), pictures.image(classes))


@pytest.mark.parametrize(
    ("count", "size", "seed", "named"),
    [(0, 64, 0, "0 images"), (4, 8, 0, "8 pixels"), (4, 64, -1, "seed is -1")],
)
def test_impossible_requests_are_refused(count, size, seed, named):
    with pytest.raises(DataError, match=named):
        SyntheticClasses("train", count, size, seed)


def test_pictures_outside_the_set_are_refused():
    with pytest.raises(DataError, match="no picture 3"):
        SyntheticClasses("train", 3, 32, 0).image(3)

"""The built-in street scenes: reproducible, complete, hard to tell by colour, fast."""

import hashlib
import time

import numpy as np
import pytest

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data.classes import CITYSCAPES, IGNORE
from lgcnet_fast.data.dataset import open_dataset
from lgcnet_fast.data.painting.canvas import Street
from lgcnet_fast.data.synthetic import SyntheticStreets
from lgcnet_fast.errors import DataError

SCENES = 60


@pytest.fixture(scope="module")
def streets() -> SyntheticStreets:
    return SyntheticStreets("train", SCENES, (128, 256), 0)


@pytest.fixture(scope="module")
def labels(streets) -> np.ndarray:
    return np.stack([streets.label(i) for i in range(SCENES)])


def test_street_names_are_the_cityscapes_train_ids():
    names = [street.name.lower().replace("_", " ") for street in Street if street < IGNORE]
    assert tuple(names) == CITYSCAPES.names
    assert Street.VOID == IGNORE


def test_shapes_and_types(streets):
    image, label = streets.image(3), streets.label(3)
    assert image.shape == (128, 256, 3) and image.dtype == np.uint8
    assert label.shape == (128, 256) and label.dtype == np.uint8
    assert len(streets) == SCENES and streets.stem(3) == "train_00003"


def test_a_scene_is_a_function_of_seed_split_and_index(streets):
    again = SyntheticStreets("train", 10, (128, 256), 0)
    assert np.array_equal(streets.image(7), again.image(7))
    assert np.array_equal(streets.label(7), again.label(7))
    for other in (
        SyntheticStreets("val", 10, (128, 256), 0),
        SyntheticStreets("train", 10, (128, 256), 1),
    ):
        assert not np.array_equal(streets.label(7), other.label(7))
    assert not np.array_equal(streets.label(7), streets.label(8))


def test_what_a_caller_does_to_a_scene_stays_with_the_caller(streets):
    image = streets.image(0)
    before = hashlib.sha256(image.tobytes()).hexdigest()
    image[:] = 0
    assert hashlib.sha256(streets.image(0).tobytes()).hexdigest() == before


def test_every_class_is_frequent_enough_to_learn(labels):
    shares = np.bincount(labels.ravel(), minlength=256) / labels.size
    presence = np.array([np.any(labels == c, axis=(1, 2)).mean() for c in range(len(CITYSCAPES))])
    assert shares[: len(CITYSCAPES)].min() > 0.003
    assert presence.min() > 1 / 3
    assert 0 < shares[IGNORE] < 0.05
    assert shares[: len(CITYSCAPES)].sum() + shares[IGNORE] == pytest.approx(1)


def test_mean_colour_does_not_name_the_class(streets, labels):
    """A nearest-mean-colour classifier fitted on these very scenes stays close to chance."""
    images = np.stack([streets.image(i) for i in range(SCENES)]).astype(np.float32)
    valid = labels != IGNORE
    pixels, targets = images[valid], labels[valid]
    means = np.stack([pixels[targets == c].mean(0) for c in range(len(CITYSCAPES))])
    chosen = np.random.default_rng(0).integers(0, len(pixels), 20000)
    distance = np.square(pixels[chosen, None, :] - means).sum(-1)
    predicted, truth = distance.argmin(1), targets[chosen]
    ious = [
        np.sum((predicted == c) & (truth == c)) / max(1, np.sum((predicted == c) | (truth == c)))
        for c in range(len(CITYSCAPES))
    ]
    assert np.mean(ious) < 0.12


@pytest.mark.parametrize("size", [(16, 16), (17, 129), (96, 192), (200, 40)])
def test_odd_sizes(size):
    streets = SyntheticStreets("val", 4, size, 3)
    for i in range(4):
        assert streets.image(i).shape == (*size, 3)
        assert streets.label(i).shape == size


def test_fast_enough_to_paint_while_training():
    streets = SyntheticStreets("train", 20, (256, 512), 5)
    streets.image(0)
    taken = []
    for i in range(1, 12):
        start = time.process_time()
        streets.image(i)
        taken.append(time.process_time() - start)
    # Processor time of the quickest: what the code costs, whatever else the machine does.
    assert min(taken) < 0.06


def test_opened_through_the_configuration():
    config = DataConfig(synthetic_images=8, synthetic_size=(32, 64))
    assert len(open_dataset(config, "train")) == 8
    assert len(open_dataset(config, "val")) == 2


@pytest.mark.parametrize(
    ("count", "size", "seed", "named"),
    [(0, (64, 64), 0, "0 images"), (4, (64, 8), 0, "8 pixels"), (4, (64, 64), -1, "seed is -1")],
)
def test_impossible_requests_are_refused(count, size, seed, named):
    with pytest.raises(DataError, match=named):
        SyntheticStreets("train", count, size, seed)


@pytest.mark.parametrize("index", [-1, SCENES])
def test_scenes_outside_the_set_are_refused(streets, index):
    with pytest.raises(DataError, match=f"no scene {index}"):
        streets.image(index)

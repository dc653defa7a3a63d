from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data import class_loader
from lgcnet_fast.data.class_folder import open_class_folder
from lgcnet_fast.data.class_loader import ClassLoader, open_class_images, reduce_to, short_side

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path, save):
    for target, name in enumerate(("ant", "bee", "cat")):
        for index in range(3):
            size = (40, 60) if index else (12, 10)
            pixels = np.full((*size, 3), 80 * target + index, np.uint8)
            save(tmp_path / "images" / "train" / name / f"{index}.png", pixels)
            save(tmp_path / "images" / "val" / name / f"{index}.png", pixels)
    return tmp_path / "images"


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache="ram", cache_dir=tmp_path / "cache")


@pytest.fixture(params=["packed", "on demand"])
def images_of(request, root, config, monkeypatch):
    if request.param == "on demand":
        monkeypatch.setattr(class_loader, "free_bytes", lambda folder: 10)
    return lambda split: open_class_images(open_class_folder(root, split), 16, config, CPU)


def test_training_batches(images_of):
    loader = ClassLoader(images_of("train"), 16, 4, CPU, seed=1)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    for images, labels in batches:
        assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        values = ((images[:, 0, 8, 8] * 0.229 + 0.485) * 255).round().int()
        assert torch.equal(values // 80, labels.int())
    loader.set_epoch(0)
    again = list(loader)
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))
    loader.set_epoch(1)
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(batches, loader, strict=True))


def test_validation_shows_every_image_once(images_of):
    images = images_of("val")
    loader = ClassLoader(images, 16, 4, CPU, train=False)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert images.classes == ("ant", "bee", "cat")


def test_large_sets_are_announced(root, config, monkeypatch, caplog):
    monkeypatch.setattr(class_loader, "free_bytes", lambda folder: 10)
    with caplog.at_level(logging.WARNING):
        open_class_images(open_class_folder(root, "val"), 16, config, CPU)
    assert "decoded anew" in caplog.text


def test_images_are_reduced_but_not_enlarged(images_of):
    images = images_of("train").pixels.images([0, 1])
    assert [tuple(image.shape) for image in images] == [(12, 10, 3), (18, 27, 3)]
    assert short_side(224) == 256 and short_side(16) == 18
    assert reduce_to(np.zeros((1000, 3, 3), np.uint8), 2).shape == (667, 2, 3)


def test_other_sizes_do_not_share_a_cache(root, config):
    dataset = open_class_folder(root, "train")
    for image_size, height in ((16, 18), (28, 32)):
        images = open_class_images(dataset, image_size, config, CPU)
        assert images.pixels.images([1])[0].shape[0] == height


def test_real_caltech(real_data, tmp_path):
    config = DataConfig(cache_dir=tmp_path)
    images = open_class_images(open_class_folder(real_data / "caltech101", "val"), 64, config, CPU)
    labels = torch.cat([b.labels for b in ClassLoader(images, 64, 64, CPU, train=False)])
    assert torch.equal(labels, images.targets) and len(labels) == 835

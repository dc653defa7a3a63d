from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data import memory, packing
from lgcnet_fast.data.cache import cache_folder, open_cache
from lgcnet_fast.data.dataset import open_dataset
from lgcnet_fast.data.memory import choose_storage, free_host_memory
from lgcnet_fast.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture
def config(camvid_root, tmp_path):
    return DataConfig(name="camvid", root=camvid_root, cache="disk", cache_dir=tmp_path / "cache")


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """Paths of the images decoded so far."""
    from lgcnet_fast.data import dataset

    paths: list[Path] = []
    read = dataset.read_image

    def counting(path: Path):
        paths.append(path)
        return read(path)

    monkeypatch.setattr(dataset, "read_image", counting)
    return paths


def assert_equal(cache, dataset) -> None:
    assert len(cache) == len(dataset)
    for index in range(len(dataset)):
        assert cache.stem(index) == dataset.stem(index)
        assert cache.size(index) == dataset.label(index).shape
        np.testing.assert_array_equal(cache.image(index), dataset.image(index))
        np.testing.assert_array_equal(cache.label(index), dataset.label(index))


@pytest.mark.parametrize("storage", ["disk", "ram"])
def test_cache_holds_what_was_decoded(config, storage):
    dataset = open_dataset(config, "train")
    cache = open_cache(dataset, config.model_copy(update={"cache": storage}), CPU)
    assert cache.storage == storage and cache.classes == dataset.classes
    assert_equal(cache, dataset)


def test_images_are_decoded_once(config, decoded):
    seen = []
    open_cache(open_dataset(config, "train"), config, CPU, lambda *state: seen.append(state))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(decoded) == 3
    open_cache(open_dataset(config, "train"), config, CPU)
    assert len(decoded) == 3


def test_stale_cache_is_rebuilt_with_a_message(config, save, caplog):
    open_cache(open_dataset(config, "train"), config, CPU)
    save(config.root / "train" / "train0.png", np.zeros((12, 16, 3), np.uint8))
    dataset = open_dataset(config, "train")
    with caplog.at_level(logging.WARNING):
        cache = open_cache(dataset, config, CPU)
    assert "stale" in caplog.text
    assert_equal(cache, dataset)
    assert len(list(config.cache_dir.iterdir())) == 2, "the predecessor takes no room"


def flip_a_byte(data: Path, index: Path) -> None:
    content = bytearray(data.read_bytes())
    content[7] ^= 255
    data.write_bytes(content)


def change_index(key: str, value: object):
    def change(data: Path, index: Path) -> None:
        content = json.loads(index.read_text())
        content[key] = value
        index.write_text(json.dumps(content))

    return change


DAMAGES = {
    "truncated data": lambda data, index: os.truncate(data, 100),
    "no data": lambda data, index: data.unlink(),
    "garbage index": lambda data, index: index.write_bytes(b"\xff{"),
    "truncated index": lambda data, index: os.truncate(index, 40),
    "wrong type": change_index("items", [["a", "b", 1, 2]]),
    "negative size": change_index("items", [["a", -4, 4, 0]]),
    "other format": change_index("format", 0),
    "changed byte": flip_a_byte,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_rebuilt_with_a_message(config, caplog, damage):
    in_ram = config.model_copy(update={"cache": "ram"})
    dataset = open_dataset(config, "train")
    open_cache(dataset, in_ram, CPU)
    (index,) = config.cache_dir.glob("*.json")
    (data,) = config.cache_dir.glob("*.bin")
    DAMAGES[damage](data, index)
    with caplog.at_level(logging.WARNING):
        cache = open_cache(dataset, in_ram, CPU)
    assert "is built again" in caplog.text
    assert_equal(cache, dataset)


def test_nothing_is_left_of_a_failed_build(config):
    (config.root / "train" / "train2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="train2.png"):
        open_cache(open_dataset(config, "train"), config, CPU)
    assert list(config.cache_dir.iterdir()) == []


def test_unwritable_folder_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"cache_dir": tmp_path / "file" / "cache"})
    with pytest.raises(DataError, match="cannot be written.*data.cache_dir"):
        open_cache(open_dataset(config, "train"), blocked, CPU)


def test_full_disk_is_named(config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.PackFiles, "_write_data", full)
    with pytest.raises(DataError, match="No space left on device.*data.cache_dir"):
        open_cache(open_dataset(config, "train"), config, CPU)


def test_splits_and_sets_do_not_share_files(config):
    for split in ("train", "val"):
        open_cache(open_dataset(config, split), config, CPU)
    for seed in (0, 1):
        streets = config.model_copy(
            update={
                "name": "synthetic",
                "synthetic_images": 4,
                "synthetic_size": (32, 64),
                "synthetic_seed": seed,
            }
        )
        dataset = open_dataset(streets, "train")
        assert_equal(open_cache(dataset, streets, CPU), dataset)
    assert len(list(config.cache_dir.glob("*.bin"))) == 4


def test_storage_is_chosen_by_size(monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1000)
    assert choose_storage("auto", 499, CPU) == "ram"
    assert choose_storage("auto", 500, CPU) == "disk"
    assert choose_storage("disk", 1, CPU) == "disk"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 800))
    cuda = torch.device("cuda")
    assert choose_storage("auto", 99, cuda) == "gpu"
    assert choose_storage("auto", 100, cuda) == "ram"
    with pytest.raises(DataError, match='data.cache = "gpu" on device cpu'):
        choose_storage("gpu", 1, CPU)


def test_free_host_memory_is_plausible():
    assert 2**20 < free_host_memory() < 2**50


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "lgcnet_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / ".cache" / "lgcnet_fast"

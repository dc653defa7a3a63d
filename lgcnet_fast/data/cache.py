"""The packed cache: every image is decoded once, then read from disk, RAM or GPU memory."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.data.dataset import SegmentationDataset, image_and_label
from lgcnet_fast.data.memory import Storage, Wanted, choose_storage
from lgcnet_fast.data.packing import Decoded, PackFiles, PackIndex
from lgcnet_fast.data.parallel import ordered_map
from lgcnet_fast.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the number of images decoded so far and of all."""

log = logging.getLogger(__name__)


class PackedImages:
    """Decoded images, and labels where the pack has them, as views into one flat tensor."""

    def __init__(self, index: PackIndex, data: Tensor, storage: Storage) -> None:
        self.index = index
        self.data = data
        self.storage: Storage = storage
        self._offsets = index.offsets

    def __len__(self) -> int:
        return len(self.index.items)

    @property
    def device(self) -> torch.device:
        """Where the pixels lie: the CPU for `disk` and `ram`."""
        return self.data.device

    def stem(self, index: int) -> str:
        return self.index.items[index].stem

    def size(self, index: int) -> tuple[int, int]:
        """(height, width)"""
        item = self.index.items[index]
        return item.height, item.width

    def image(self, index: int) -> Tensor:
        """uint8 (height, width, 3), a view."""
        height, width = self.size(index)
        start = self._offsets[index]
        return self.data[start : start + height * width * 3].view(height, width, 3)

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        return [self.image(index) for index in indices]

    def label(self, index: int) -> Tensor:
        """uint8 (height, width) train ids, a view. Only in packs with labels."""
        height, width = self.size(index)
        start = self._offsets[index] + height * width * 3
        return self.data[start : start + height * width].view(height, width)


class PackedCache(PackedImages):
    """A segmentation data set, decoded."""

    def __init__(self, classes: ClassSet, packed: PackedImages) -> None:
        super().__init__(packed.index, packed.data, packed.storage)
        self.classes = classes


def open_cache(
    dataset: SegmentationDataset,
    config: DataConfig,
    device: torch.device,
    progress: Progress | None = None,
) -> PackedCache:
    """The cache of a data set, built first where it is missing, stale or damaged.

    Storage follows `config.cache`. Raises `DataError` (unreadable file, unequal sizes, no room).
    """

    def decode(index: int) -> Decoded:
        return Decoded(dataset.stem(index), *image_and_label(dataset, index))

    files = PackFiles(cache_folder(config), key_of(dataset), dataset.fingerprint())
    packed = open_packed(files, decode, len(dataset), 4, config.cache, device, progress)
    return PackedCache(dataset.classes, packed)


def open_packed(
    files: PackFiles,
    decode: Callable[[int], Decoded],
    count: int,
    channels: int,
    wanted: Wanted,
    device: torch.device,
    progress: Progress | None,
) -> PackedImages:
    """Reads the pack, or builds it and reads it then."""
    index = files.read()
    packed = None if isinstance(index, str) else _load(files, index, wanted, device)
    if packed is None:
        state = index if isinstance(index, str) else "damaged"
        if state != "missing":
            log.warning("%s: the cache is %s and is built again", files.index, state)
        index = files.write(_reporting(ordered_map(decode, count), count, progress), channels)
        packed = _load(files, index, wanted, device)
    if packed is None:
        raise DataError(
            f"{files.data}: holds other pixels than were written; check the disk or set "
            "data.cache_dir to another"
        )
    return packed


def key_of(dataset: SegmentationDataset) -> str:
    """Name of the cache's files, without their endings."""
    digest = hashlib.sha256(dataset.identity().encode()).hexdigest()
    readable = re.sub("[^a-z0-9_]", "_", f"{dataset.name}-{dataset.split}".lower())
    return f"{readable[:60]}-{digest[:12]}"


def cache_folder(config: DataConfig) -> Path:
    """`data.cache_dir`, or the user's cache folder."""
    if config.cache_dir is not None:
        return config.cache_dir
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lgcnet_fast"


def _reporting(
    decoded: Iterator[Decoded], count: int, progress: Progress | None
) -> Iterator[Decoded]:
    for done, item in enumerate(decoded, start=1):
        yield item
        if progress is not None:
            progress(done, count)


def _load(
    files: PackFiles, index: PackIndex, wanted: Wanted, device: torch.device
) -> PackedImages | None:
    """None where the pixels are not those that were packed (seen only when all are read)."""
    storage = choose_storage(wanted, index.offsets[-1], device)
    mapped = _map_file(files.data)
    if storage == "disk":
        return PackedImages(index, mapped, storage)
    data = _read_whole(index, mapped, device if storage == "gpu" else torch.device("cpu"))
    return None if data is None else PackedImages(index, data, storage)


def _map_file(path: Path) -> Tensor:
    mapped = np.memmap(path, np.uint8, mode="r")
    with warnings.catch_warnings():
        # torch knows no read-only tensors; nothing here writes to a view.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(mapped)


def _read_whole(index: PackIndex, mapped: Tensor, device: torch.device) -> Tensor | None:
    data = torch.empty(len(mapped), dtype=torch.uint8, device=device)
    offsets = index.offsets

    def copy(item: int) -> bool:
        part = slice(offsets[item], offsets[item + 1])
        data[part].copy_(mapped[part])
        return zlib.crc32(mapped[part].numpy().data) == index.items[item].checksum

    return data if all(ordered_map(copy, len(index.items))) else None

"""Batches of classified images for pretraining, ready on the device."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data.augment import ClassificationAugmentation, centre_window
from lgcnet_fast.data.cache import PackedImages, Progress, cache_folder, open_packed
from lgcnet_fast.data.class_folder import ClassificationDataset
from lgcnet_fast.data.loader import EpochOrder, ahead, must_pin
from lgcnet_fast.data.normalise import normalise
from lgcnet_fast.data.packing import Decoded, PackFiles, free_bytes
from lgcnet_fast.data.parallel import worker_count
from lgcnet_fast.data.windows import Staged, render, stage

log = logging.getLogger(__name__)


class ClassBatch(NamedTuple):
    images: Tensor
    """float32 (B, 3, s, s), normalised, channels_last."""
    labels: Tensor
    """int64 (B,) class indices."""


@dataclass(frozen=True)
class ClassImages:
    """Images whose shorter side is at most `short_side(image_size)`, and their classes."""

    pixels: PackedImages | DecodedOnDemand
    targets: Tensor
    """int64 (N,)"""
    classes: tuple[str, ...]


class DecodedOnDemand:
    """Images that are read from their files whenever asked for; for sets too large to pack."""

    device = torch.device("cpu")

    def __init__(self, dataset: ClassificationDataset, shortest: int) -> None:
        self.dataset = dataset
        self.shortest = shortest
        self._pool = ThreadPoolExecutor(worker_count())

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """uint8 (height, width, 3) each. Raises `DataError` (unreadable file)."""
        return [torch.from_numpy(image) for image in self._pool.map(self._read, indices)]

    def _read(self, index: int) -> np.ndarray:
        return reduce_to(self.dataset.image(index), self.shortest)


def open_class_images(
    dataset: ClassificationDataset,
    image_size: int,
    config: DataConfig,
    device: torch.device,
    progress: Progress | None = None,
) -> ClassImages:
    """The images of a class data set, packed when the cache folder has room for them.

    Raises `DataError` (unreadable file, cache folder that cannot be written).
    """
    targets = torch.tensor([dataset.target(index) for index in range(len(dataset))])
    shortest = short_side(image_size)
    folder = cache_folder(config)
    # Photographs are about 4:3; half of the room is left to others.
    expected = len(dataset) * 4 * shortest**2
    if expected > free_bytes(folder) / 2:
        log.warning("%s: no room for %.0f GB, images are decoded anew", folder, expected / 1e9)
        return ClassImages(DecodedOnDemand(dataset, shortest), targets, dataset.classes)

    def decode(index: int) -> Decoded:
        return Decoded(str(index), reduce_to(dataset.image(index), shortest), None)

    digest = hashlib.sha256(dataset.identity().encode()).hexdigest()
    key = f"classes-{dataset.split}-{shortest}-{digest[:12]}"
    files = PackFiles(folder, key, dataset.fingerprint())
    packed = open_packed(files, decode, len(dataset), 3, config.cache, device, progress)
    return ClassImages(packed, targets, dataset.classes)


def short_side(image_size: int) -> int:
    """Shorter side that images are reduced to: 256 for 224."""
    return round(image_size * 256 / 224)


def reduce_to(image: np.ndarray, shortest: int) -> np.ndarray:
    """The image with a shorter side of `shortest`, antialiased; smaller ones stay as they are."""
    height, width = image.shape[:2]
    scale = shortest / min(height, width)
    if scale >= 1:
        return image
    size = (max(shortest, round(width * scale)), max(shortest, round(height * scale)))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


class ClassLoader:
    """Training: shuffled, random resized crop and flip, full batches, the same for equal seed,
    epoch and ranks. Else: the centre crop of every image, in order.

    `batch_size` is what this process gets.
    """

    def __init__(
        self,
        images: ClassImages,
        image_size: int,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        train: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images = images
        self.augmentation = ClassificationAugmentation(image_size)
        self.batch_size = batch_size
        self.device = device
        self.train = train
        self.order = EpochOrder(len(images.targets), batch_size, seed, rank, world_size)
        self.epoch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        if self.train:
            return self.order.batches
        return -(-len(self.images.targets) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the augmentation of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[ClassBatch]:
        pin = must_pin([self.images.pixels.device], self.device)
        for staged, targets in ahead(self._stage_all(self.epoch, pin), pin):
            crops, _ = render(staged.to(self.device))
            yield ClassBatch(normalise(crops), targets.to(self.device, non_blocking=True))

    def _stage_all(self, epoch: int, pin: bool) -> Iterator[tuple[Staged, Tensor]]:
        generator = self.order.generator(epoch)
        for indices in self.order.epoch(epoch) if self.train else self._in_order():
            images = self.images.pixels.images(indices)
            sizes = [(image.shape[0], image.shape[1]) for image in images]
            if self.train:
                windows = [self.augmentation.draw(size, generator) for size in sizes]
            else:
                windows = [centre_window(size) for size in sizes]
            targets = self.images.targets[indices]
            staged = stage(images, None, windows, self.augmentation.crop, pin)
            yield staged, targets.pin_memory() if pin else targets

    def _in_order(self) -> Iterator[list[int]]:
        count = len(self.images.targets)
        for start in range(0, count, self.batch_size):
            yield list(range(start, min(start + self.batch_size, count)))

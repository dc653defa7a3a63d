"""Batches for training and scoring segmentation networks, ready on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.config import Augmentation
from lgcnet_fast.data.augment import (
    SegmentationAugmentation,
    draw_colour_factors,
    jitter_colours,
)
from lgcnet_fast.data.cache import PackedCache
from lgcnet_fast.data.normalise import network_input, normalise
from lgcnet_fast.data.parallel import T, prefetch
from lgcnet_fast.data.windows import Staged, render, stage
from lgcnet_fast.errors import DataError


class Batch(NamedTuple):
    images: Tensor
    """float32 (B, 3, h, w), normalised, channels_last."""
    labels: Tensor
    """int64 (B, h, w) train ids, 255 ignored."""


class EvalBatch(NamedTuple):
    images: Tensor
    """float32 (B, 3, h, w), normalised, channels_last, resized to the network's input."""
    labels: Tensor
    """int64 (B, H, W) train ids at the data set's resolution."""
    indices: tuple[int, ...]
    """Which images of the cache these are."""


class TrainLoader:
    """Shuffled, augmented crops. An epoch is the same whenever seed, epoch and ranks are.

    `batch_size` is what this process gets; all ranks together see each image at most once an
    epoch. Images left over after the last full batch are dropped; a set smaller than one batch
    is repeated to fill it.
    """

    def __init__(
        self,
        caches: PackedCache | Sequence[PackedCache],
        augmentation: Augmentation,
        batch_size: int,
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.caches = [caches] if isinstance(caches, PackedCache) else list(caches)
        _check_classes(self.caches)
        self.augmentation = SegmentationAugmentation(augmentation)
        self.batch_size = batch_size
        self.device = device
        self.order = EpochOrder(sum(map(len, self.caches)), batch_size, seed, rank, world_size)
        self.epoch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.order.batches

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the augmentation of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        pin = must_pin([cache.device for cache in self.caches], self.device)
        for staged, factors in ahead(self._stage_all(self.epoch, pin), pin):
            images, labels = render(staged.to(self.device))
            if factors is not None:
                images = jitter_colours(images, factors.to(self.device, non_blocking=True))
            assert labels is not None
            yield Batch(normalise(images), labels)

    def _stage_all(self, epoch: int, pin: bool) -> Iterator[tuple[Staged, Tensor | None]]:
        generator = self.order.generator(epoch)
        starts = [0, *accumulate(map(len, self.caches))]
        for indices in self.order.epoch(epoch):
            which = np.searchsorted(starts, indices, side="right") - 1
            picked = [(self.caches[c], i - starts[c]) for c, i in zip(which, indices, strict=True)]
            windows = [self.augmentation.draw(cache.size(i), generator) for cache, i in picked]
            images = [cache.image(i) for cache, i in picked]
            labels = [cache.label(i) for cache, i in picked]
            strength = self.augmentation.config.colour
            factors = None
            if strength > 0:
                factors = draw_colour_factors(len(picked), strength, generator)
            yield stage(images, labels, windows, self.augmentation.crop, pin), factors


class EvalLoader:
    """Whole images in order, resized to `size` for the network, with full-resolution labels.

    A batch holds neighbours of one size, so it may be smaller than `batch_size`.
    """

    def __init__(
        self,
        cache: PackedCache,
        size: tuple[int, int] | None,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.cache = cache
        self.size = size
        self.device = device
        self.batches = _runs_of_equal_size(cache, batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[EvalBatch]:
        pin = must_pin([self.cache.device], self.device)
        for images, labels, indices in ahead(self._stack_all(pin), pin):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            yield EvalBatch(network_input(images, self.size), labels.long(), indices)

    def _stack_all(self, pin: bool) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
        for indices in self.batches:
            images = torch.stack([self.cache.image(i) for i in indices])
            labels = torch.stack([self.cache.label(i) for i in indices])
            if pin:
                images, labels = images.pin_memory(), labels.pin_memory()
            yield images, labels, indices


class EpochOrder:
    """Which images make each batch of an epoch, on one of several ranks."""

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if count < 1:
            raise DataError("no images to train on; check data.root and data.train_splits")
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batches = max(1, count // (batch_size * world_size))

    def epoch(self, epoch: int) -> Iterator[list[int]]:
        wanted = self.batches * self.batch_size * self.world_size
        # Without the rank: all ranks must share one order to share out the images.
        shared = _generator(self.seed, epoch)
        rounds = -(-wanted // self.count)
        order = torch.cat([torch.randperm(self.count, generator=shared) for _ in range(rounds)])
        own = order[:wanted].view(self.batches, self.world_size, self.batch_size)[:, self.rank]
        yield from own.tolist()

    def generator(self, epoch: int) -> torch.Generator:
        """For what each rank draws by itself in an epoch."""
        return _generator(self.seed, epoch, self.rank + 1)


def ahead(items: Iterable[T], pin: bool) -> Iterable[T]:
    """Computed by a thread where host memory feeds a GPU; elsewhere a thread gains nothing."""
    return prefetch(items) if pin else items


def must_pin(sources: Iterable[torch.device], device: torch.device) -> bool:
    """Whether pixels travel from host memory to a GPU."""
    return device.type == "cuda" and any(source.type == "cpu" for source in sources)


def _generator(*numbers: int) -> torch.Generator:
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _check_classes(caches: list[PackedCache]) -> None:
    for cache in caches[1:]:
        if cache.classes != caches[0].classes:
            first, other = caches[0].classes.name, cache.classes.name
            raise DataError(f"classes {other!r} cannot be trained together with {first!r}")


def _runs_of_equal_size(cache: PackedCache, batch_size: int) -> list[tuple[int, ...]]:
    batches: list[list[int]] = []
    for index in range(len(cache)):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and cache.size(last[0]) == cache.size(index):
            last.append(index)
        else:
            batches.append([index])
    return [tuple(batch) for batch in batches]

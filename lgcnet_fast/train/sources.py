"""Where the stages get their batches from: packed caches behind loaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lgcnet_fast.config import Augmentation
from lgcnet_fast.data.cache import PackedCache, Progress, open_cache
from lgcnet_fast.data.class_folder import open_classes
from lgcnet_fast.data.class_loader import ClassImages, ClassLoader, open_class_images
from lgcnet_fast.data.loader import EvalLoader, TrainLoader
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.train.distributed import barrier
from lgcnet_fast.train.progress import CountProgress
from lgcnet_fast.train.run import Run

T = TypeVar("T")


def packed(run: Run, split: str) -> PackedCache:
    """The cache of a split."""
    dataset, config = run.dataset(split), run.config.data
    return _first_rank_first(
        run, f"packing {split}", lambda progress: open_cache(dataset, config, run.device, progress)
    )


def train_loader(
    run: Run, splits: tuple[str, ...], augmentation: Augmentation, batch_size: int
) -> TrainLoader:
    """Augmented batches of `batch_size` for this rank from all `splits` together."""
    caches = [packed(run, split) for split in splits]
    ranks = run.ranks
    return TrainLoader(
        caches, augmentation, batch_size, run.device, run.seed, ranks.rank, ranks.world
    )


def eval_loader(run: Run, split: str) -> EvalLoader:
    """Whole images at the evaluation size with full-resolution labels."""
    config = run.config.evaluate
    return EvalLoader(packed(run, split), config.size, config.batch_size, run.device)


def class_loaders(run: Run) -> tuple[ClassLoader, ClassLoader, int]:
    """Training and validation batches for pretraining, and the number of classes."""
    config, ranks = run.config.pretrain, run.ranks
    batch_size = ranks.share(config.batch_size, "pretrain.batch_size")
    size, device = config.image_size, run.device

    def images(split: str) -> ClassImages:
        dataset = open_classes(config, split, size)
        return _first_rank_first(
            run,
            f"packing classes {split}",
            lambda progress: open_class_images(dataset, size, run.config.data, device, progress),
        )

    train, validation = images("train"), images("val")
    loader = ClassLoader(train, size, batch_size, device, run.seed, True, ranks.rank, ranks.world)
    return (
        loader,
        ClassLoader(validation, size, batch_size, device, train=False),
        len(train.classes),
    )


def _first_rank_first(run: Run, title: str, build: Callable[[Progress], T]) -> T:
    """The first rank builds a cache where it is missing; the others wait, then read it."""
    if not run.ranks.first:
        barrier(run.ranks)
    built = build(CountProgress(title, enabled=run.ranks.first))
    if run.ranks.first:
        barrier(run.ranks)
    return built


def optimiser_steps(batches: int, accumulate: int, key: str) -> int:
    """Optimiser steps an epoch; raises `ConfigError` naming `key` if there would be none."""
    steps = batches // accumulate
    if steps == 0:
        raise ConfigError(
            f"{key} = {accumulate}, but an epoch has only {batches} batches; "
            f"use at most {batches}, or a smaller batch size"
        )
    return steps


def label_shares(run: Run, splits: tuple[str, ...]) -> Tensor:
    """(classes,) float32: each class's share of the labelled pixels."""
    counts = torch.zeros(256, dtype=torch.int64)
    for split in splits:
        cache = packed(run, split)
        for index in range(len(cache)):
            counts += torch.bincount(cache.label(index).flatten().cpu(), minlength=256)
    shares = counts[: run.num_classes].float()
    return shares / shares.sum().clamp(min=1)

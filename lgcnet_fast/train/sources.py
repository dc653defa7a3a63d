"""Where the stages get their batches from: packed caches behind loaders."""

from __future__ import annotations

import torch
from torch import Tensor

from lgcnet_fast.config import Augmentation
from lgcnet_fast.data.cache import PackedCache, open_cache
from lgcnet_fast.data.loader import EvalLoader, TrainLoader
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.train.distributed import barrier
from lgcnet_fast.train.progress import CountProgress
from lgcnet_fast.train.run import Run


def packed(run: Run, split: str) -> PackedCache:
    """The cache of a split; the first rank builds it where it is missing, the others wait."""
    dataset = run.dataset(split)
    if not run.ranks.first:
        barrier(run.ranks)
    progress = CountProgress(f"packing {split}", enabled=run.ranks.first)
    cache = open_cache(dataset, run.config.data, run.device, progress)
    if run.ranks.first:
        barrier(run.ranks)
    return cache


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


def optimiser_steps(loader: TrainLoader, accumulate: int, key: str) -> int:
    """Optimiser steps an epoch; raises `ConfigError` naming `key` if there would be none."""
    steps = len(loader) // accumulate
    if steps == 0:
        raise ConfigError(
            f"{key} = {accumulate}, but an epoch has only {len(loader)} batches; "
            f"use at most {len(loader)}, or a smaller batch size"
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

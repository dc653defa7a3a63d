"""Whether the stages of a run can train on their batches, before any of them begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lgcnet_fast.data.loader import EpochOrder
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.latency.predict import uniform_arch
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.train.derive import given_genotype
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.sources import optimiser_steps

META = torch.device("meta")
"""Tensors with shapes and without values: nothing is computed."""

Forward = Callable[[nn.Module, Tensor], object]


def check_batches(run: Run) -> None:
    """Raises `ConfigError` naming the keys of the first stage whose batches cannot work."""
    config, space, classes = run.config, run.space, run.num_classes
    if config.genotype is None and config.search.strategy == "gradient":
        _check_accumulation(run, "search")
        crop = config.search.augmentation.crop
        z = uniform_arch(space, META)
        _try_on_shapes(run, "search", space.build_supernet(classes), crop, lambda n, x: n(x, z))
    genotype = _representative(run)
    if config.pretrain.enabled:
        size = (config.pretrain.image_size, config.pretrain.image_size)
        _try_on_shapes(run, "pretrain", space.build_classifier(genotype, classes), size)
    _check_accumulation(run, "finetune")
    crop = config.finetune.augmentation.crop
    _try_on_shapes(run, "finetune", space.build(genotype, classes), crop)


def _representative(run: Run) -> Genotype:
    """The genotype of the run where it is given, else a random one of the same space."""
    if run.config.genotype is not None:
        return given_genotype(run)
    return run.space.random_genotype(torch.Generator().manual_seed(run.seed))


def _check_accumulation(run: Run, stage: str) -> None:
    config, ranks = getattr(run.config, stage), run.ranks
    images = sum(len(run.dataset(split)) for split in run.config.data.train_splits)
    per_rank = ranks.share(config.batch_size, f"{stage}.batch_size")
    order = EpochOrder(images, per_rank, run.seed, ranks.rank, ranks.world)
    optimiser_steps(order.batches, config.accumulate, f"{stage}.accumulate")


def _try_on_shapes(
    run: Run,
    stage: str,
    network: nn.Module,
    size: tuple[int, int],
    forward: Forward = lambda network, images: network(images),
) -> None:
    """Batch norm needs two values a channel, which one small crop does not leave at the end."""
    images = getattr(run.config, stage).batch_size
    try:
        forward(network.to(META).train(), torch.empty(images, 3, *size, device=META))
    except ValueError as error:
        key = "pretrain.image_size" if stage == "pretrain" else f"{stage}.augmentation.crop"
        raise ConfigError(
            f"{stage}.batch_size = {images} with {key} = {size[0]}x{size[1]}: the network cannot "
            f"be trained on such batches ({error}); raise one of them"
        ) from None

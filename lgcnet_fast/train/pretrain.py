"""Image classification before finetuning (LGCNet section 6): what the backbone starts from."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.config import PretrainConfig
from lgcnet_fast.data.class_loader import ClassBatch, ClassLoader
from lgcnet_fast.train.capture import Step, captured
from lgcnet_fast.train.checkpoint import Stateful, load_checkpoint, save_checkpoint
from lgcnet_fast.train.distributed import parallel
from lgcnet_fast.train.finite import require_finite, require_finite_parameters
from lgcnet_fast.train.metrics import MetricsLog
from lgcnet_fast.train.optimisers import SGD
from lgcnet_fast.train.precision import Precision, placed
from lgcnet_fast.train.progress import StageProgress
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.schedules import DeviceScalar, cosine, exponential, warmup
from lgcnet_fast.train.sources import class_loaders
from lgcnet_fast.train.weights import save_weights

STAGE = "pretrain"
LOG_EVERY = 20
"""Optimiser steps between two log lines: fetching a loss waits for the device."""
WHEN_NOT_FINITE = "lower pretrain.lr, or use precision = bf16 or fp32"


def learning_rate(config: PretrainConfig, epoch: int) -> float:
    """Constant within an epoch: exponential or cosine, after a linear warm-up."""
    if config.schedule == "cosine":
        after = max(epoch - config.warmup_epochs, 0)
        lr = cosine(after, max(config.epochs - config.warmup_epochs, 1), config.lr)
    else:
        lr = exponential(epoch, config.lr, config.lr_decay)
    return lr * warmup(epoch, config.warmup_epochs)


class Pretrainer:
    """Everything that one step of the training needs."""

    def __init__(
        self, config: PretrainConfig, network: nn.Module, wrapped: nn.Module, precision: Precision
    ) -> None:
        self.config, self.network, self.wrapped = config, network, wrapped
        self.precision = precision
        self.lr = DeviceScalar(config.lr, precision.device)
        self.optimiser = SGD(network.parameters(), self.lr, config.momentum, config.weight_decay)

    def parts(self) -> dict[str, Stateful]:
        return {
            "model": self.network,
            "optimiser": self.optimiser,
            "scaler": self.precision.scaler,
        }

    def step(self, batches: Iterable[ClassBatch]) -> Tensor:
        """One optimiser step on the only batch; its loss, on the device."""
        ((images, targets),) = batches
        self.optimiser.zero_grad()
        with self.precision.autocast():
            logits = self.wrapped(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)
        self.precision.backward(loss, first=True)
        self.precision.step((self.optimiser, self.config.clip))
        return loss.detach()


def pretrain(run: Run) -> dict[str, Any]:
    """Runs or continues the stage; writes the weights of the backbone.

    Returns top-1 accuracy on val, or why the stage was skipped.
    """
    config, ranks = run.config.pretrain, run.ranks
    if not config.enabled:
        return run.finish(STAGE, {"skipped": "pretrain.enabled is false"})
    torch.manual_seed(run.seed)
    loader, validation, num_classes = class_loaders(run)
    trainer = _trainer(run, num_classes)
    network, precision = trainer.network, trainer.precision
    path, steps = run.checkpoint_path(STAGE), len(loader)
    first = load_checkpoint(path, STAGE, trainer.parts(), {}) if path.exists() else 0
    log = MetricsLog(run.stage_folder(STAGE), first, enabled=ranks.first)
    step = captured(run, STAGE, trainer.step)
    with StageProgress(STAGE, steps * config.epochs, first * steps, ranks.first) as progress:
        for epoch in range(first, config.epochs):
            loader.set_epoch(epoch)
            trainer.lr.set(learning_rate(config, epoch))
            _train_epoch(trainer, step, loader, epoch, log, progress)
            require_finite_parameters(network, STAGE, epoch, WHEN_NOT_FINITE)
            top1 = accuracy(network, validation, precision)
            log.write(epoch, (epoch + 1) * steps, top1=top1)
            log.flush()
            if ranks.first:
                save_checkpoint(path, STAGE, epoch + 1, trainer.parts(), {})
    log.close()
    if ranks.first:
        save_weights(network.get_submodule("backbone"), run.weights_path(STAGE))
    return run.finish(
        STAGE, {"epochs": config.epochs, "top1": accuracy(network, validation, precision)}
    )


def _trainer(run: Run, num_classes: int) -> Pretrainer:
    network = placed(run.space.build_classifier(run.genotype(), num_classes), run.device)
    wrapped = parallel(network, run.ranks, run.device, sync_bn=False)
    precision = Precision(run.precision, run.device)
    return Pretrainer(run.config.pretrain, network, wrapped, precision)


def _train_epoch(
    trainer: Pretrainer,
    train: Step[Tensor],
    loader: ClassLoader,
    epoch: int,
    log: MetricsLog,
    progress: StageProgress,
) -> None:
    trainer.network.train()
    epochs, lr = trainer.config.epochs, trainer.lr.value
    total, counted = torch.zeros((), device=trainer.precision.device), 0
    for index, batch in enumerate(islice(loader, len(loader))):
        total, counted = total + train((batch,)), counted + 1
        if (index + 1) % LOG_EVERY and index + 1 < len(loader):
            continue
        mean, step = float(total) / counted, epoch * len(loader) + index + 1
        require_finite(mean, STAGE, epoch, step, WHEN_NOT_FINITE)
        log.write(epoch, step, loss=mean, lr=lr)
        progress.show(step, f"{epoch + 1}/{epochs}", loss=mean, lr=lr)
        total, counted = torch.zeros_like(total), 0


@torch.no_grad()
def accuracy(network: nn.Module, batches: ClassLoader, precision: Precision) -> float:
    """Top-1 accuracy; the network is left in eval mode."""
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=precision.device)
    count = 0
    for images, targets in batches:
        with precision.autocast():
            predicted: Tensor = network(images).argmax(1)
        right += (predicted == targets).sum()
        count += len(targets)
    return float(right) / max(count, 1)

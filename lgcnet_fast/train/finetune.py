"""Training the derived network for segmentation (LGCNet section 6): SGD, poly schedule, OHEM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lgcnet_fast.config import FinetuneConfig, RunConfig
from lgcnet_fast.data.loader import Batch, EvalLoader, TrainLoader
from lgcnet_fast.deploy.run_folder import load_weights
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.ops import upsample_cross_entropy, upsample_ohem
from lgcnet_fast.space.base import SegmentationNetwork
from lgcnet_fast.train.capture import Step, captured
from lgcnet_fast.train.checkpoint import Stateful, load_checkpoint, save_checkpoint
from lgcnet_fast.train.distributed import parallel
from lgcnet_fast.train.ema import MovingAverage
from lgcnet_fast.train.evaluate import score
from lgcnet_fast.train.finite import require_finite, require_finite_parameters
from lgcnet_fast.train.metrics import MetricsLog
from lgcnet_fast.train.optimisers import SGD
from lgcnet_fast.train.precision import Precision, placed
from lgcnet_fast.train.progress import StageProgress
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.schedules import DeviceScalar, poly
from lgcnet_fast.train.sources import eval_loader, label_shares, optimiser_steps, train_loader
from lgcnet_fast.train.weights import save_weights

STAGE = "finetune"
LOG_EVERY = 20
"""Optimiser steps between two log lines: fetching a loss waits for the device."""
COARSE_DATA = "cityscapes"
COARSE_SPLITS = ("train_extra_coarse",)
WHEN_NOT_FINITE = "lower finetune.lr, or use precision = bf16 or fp32"


@dataclass(frozen=True)
class Phase:
    """Epochs `first` to `first + epochs` on one source of labels, with a schedule of their own."""

    loader: TrainLoader
    first: int
    epochs: int
    steps: int
    """Optimiser steps an epoch."""

    def steps_before(self, epoch: int) -> int:
        """Steps of this phase that lie before `epoch`."""
        return self.steps * min(max(epoch - self.first, 0), self.epochs)


class Finetuner:
    """Everything that one optimiser step of the training needs."""

    def __init__(
        self,
        config: FinetuneConfig,
        network: SegmentationNetwork,
        wrapped: nn.Module,
        precision: Precision,
        class_weights: Tensor | None,
    ) -> None:
        self.config, self.network, self.wrapped = config, network, wrapped
        self.precision, self.class_weights = precision, class_weights
        self.lr = DeviceScalar(config.lr, precision.device)
        self.optimiser = SGD(network.parameters(), self.lr, config.momentum, config.weight_decay)
        self.average = MovingAverage(network, config.ema) if config.ema is not None else None
        self.best = Best()

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and saved."""
        return self.network if self.average is None else self.average.module

    def parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {
            "model": self.network,
            "optimiser": self.optimiser,
            "scaler": self.precision.scaler,
            "best": self.best,
        }
        return parts if self.average is None else {**parts, "ema": self.average}

    def step(self, batches: Iterable[Batch]) -> Tensor:
        """One optimiser step on `config.accumulate` micro-batches; mean loss, on the device."""
        self.optimiser.zero_grad()
        total = torch.zeros((), device=self.precision.device)
        for number, (images, labels) in enumerate(batches):
            with self.precision.autocast():
                logits = self.wrapped(images)
            loss = self._loss(logits, labels) / self.config.accumulate
            self.precision.backward(loss, first=number == 0)
            total += loss.detach()
        self.precision.step((self.optimiser, None))
        if self.average is not None:
            self.average.update_parameters(self.network)
        return total

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if config.loss == "cross_entropy":
            return upsample_cross_entropy(logits, labels, self.class_weights)
        return upsample_ohem(
            logits, labels, config.ohem_threshold, config.ohem_keep, self.class_weights
        )


class Best:
    """The highest mIoU on val so far and the epoch (counted from 1) that reached it."""

    def __init__(self) -> None:
        self.miou, self.epoch = 0.0, 0

    def update(self, miou: float, epoch: int) -> None:
        if self.epoch == 0 or miou > self.miou:
            self.miou, self.epoch = miou, epoch

    def state_dict(self) -> dict[str, Any]:
        return {"miou": self.miou, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.miou, self.epoch = float(state["miou"]), int(state["epoch"])


def finetune(run: Run) -> dict[str, Any]:
    """Runs or continues the stage; the last epoch's network is the result.

    The best mIoU on val is reported too, not used: choosing an epoch on val would flatter it.
    """
    config, ranks = run.config.finetune, run.ranks
    trainer = _trainer(run)
    phases = _phases(run)
    epochs = config.coarse_epochs + config.epochs
    path = run.checkpoint_path(STAGE)
    first = load_checkpoint(path, STAGE, trainer.parts(), {}) if path.exists() else 0
    validation = eval_loader(run, run.config.data.val_split)
    log = MetricsLog(run.stage_folder(STAGE), first, enabled=ranks.first)
    step = captured(run, STAGE, trainer.step)
    done = sum(phase.steps_before(first) for phase in phases)
    total = sum(phase.steps_before(epochs) for phase in phases)
    miou: float | None = None
    with StageProgress(STAGE, total, done, ranks.first) as progress:
        for epoch in range(first, epochs):
            phase = next(p for p in reversed(phases) if epoch >= p.first)
            _train_epoch(trainer, step, phase, epoch, epochs, miou, log, progress)
            require_finite_parameters(trainer.network, STAGE, epoch, WHEN_NOT_FINITE)
            last = epoch + 1 == epochs
            if last or (epoch + 1) % config.validate_every == 0:
                miou = _miou(trainer, validation, run.num_classes)
                trainer.best.update(miou, epoch + 1)
                log.write(epoch, progress.done, miou=miou)
            log.flush()
            if ranks.first:
                save_checkpoint(path, STAGE, epoch + 1, trainer.parts(), {})
    log.close()
    if ranks.first:
        save_weights(trainer.result, run.weights_path(STAGE))
    best = trainer.best
    result = {"epochs": epochs, "best_miou": best.miou, "best_epoch": best.epoch}
    return run.finish(STAGE, result)


def _trainer(run: Run) -> Finetuner:
    config = run.config.finetune
    torch.manual_seed(run.seed)
    network = run.space.build(run.genotype(), run.num_classes)
    pretrained = run.weights_path("pretrain")
    if pretrained.exists():
        load_weights(network.backbone, pretrained)
    network = placed(network, run.device)
    wrapped = parallel(network, run.ranks, run.device, config.sync_bn)
    weights = None
    if config.class_weights == "inverse_log":
        shares = label_shares(run, run.config.data.train_splits)
        weights = 1 / torch.log(1.02 + shares.to(run.device))
    return Finetuner(config, network, wrapped, Precision(run.precision, run.device), weights)


def _phases(run: Run) -> tuple[Phase, ...]:
    """Coarse labels first, where the configuration asks for them, then fine ones."""
    config = run.config.finetune
    fine = _phase(run, run.config.data.train_splits, config.coarse_epochs, config.epochs)
    coarse = coarse_splits(run.config)
    return (_phase(run, coarse, 0, config.coarse_epochs), fine) if coarse else (fine,)


def coarse_splits(config: RunConfig) -> tuple[str, ...]:
    """Splits of the phase on coarse labels; empty if there is none. Raises `ConfigError`."""
    if config.finetune.coarse_epochs == 0:
        return ()
    if config.data.name != COARSE_DATA:
        raise ConfigError(f'finetune.coarse_epochs needs data.name = "{COARSE_DATA}"; set it to 0')
    return COARSE_SPLITS


def _phase(run: Run, splits: tuple[str, ...], first: int, epochs: int) -> Phase:
    config = run.config.finetune
    per_rank = run.ranks.share(config.batch_size, "finetune.batch_size")
    loader = train_loader(run, splits, config.augmentation, per_rank)
    steps = optimiser_steps(len(loader), config.accumulate, "finetune.accumulate")
    return Phase(loader, first, epochs, steps)


def _train_epoch(
    trainer: Finetuner,
    train: Step[Tensor],
    phase: Phase,
    epoch: int,
    epochs: int,
    miou: float | None,
    log: MetricsLog,
    progress: StageProgress,
) -> None:
    config = trainer.config
    phase.loader.set_epoch(epoch)
    batches, done = iter(phase.loader), progress.done
    trainer.network.train()
    total, counted = torch.zeros((), device=trainer.precision.device), 0
    for index in range(phase.steps):
        in_phase = phase.steps_before(epoch) + index
        lr = poly(in_phase, phase.steps * phase.epochs, config.lr, config.power)
        trainer.lr.set(lr)
        total = total + train(islice(batches, config.accumulate))
        counted, step = counted + 1, done + index + 1
        if (index + 1) % LOG_EVERY and index + 1 < phase.steps:
            continue
        loss = float(total) / counted
        require_finite(loss, STAGE, epoch, step, WHEN_NOT_FINITE)
        log.write(epoch, step, loss=loss, lr=lr)
        progress.show(step, f"{epoch + 1}/{epochs}", loss=loss, lr=lr, miou=miou)
        total, counted = torch.zeros_like(total), 0


def _miou(trainer: Finetuner, validation: EvalLoader, num_classes: int) -> float:
    scores = score(trainer.result, validation, ("full",), num_classes, trainer.precision.device)
    return scores["full"].miou()

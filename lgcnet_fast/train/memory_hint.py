"""What to do where a stage has run out of memory: the batch or the crop that would fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lgcnet_fast.config import RunConfig, Size
from lgcnet_fast.data.class_folder import open_classes
from lgcnet_fast.data.memory import free_host_memory
from lgcnet_fast.train.memory import step_memory
from lgcnet_fast.train.run import Run

TRAINING = ("search", "pretrain", "finetune")
SPARE = 0.1
"""Share of the memory that is left to the allocator's gaps and to the model's own error."""

Predict = Callable[[RunConfig], int]


@dataclass(frozen=True)
class Fit:
    """What the memory model says about a stage on a device."""

    needed: int
    """Bytes of a step as configured."""
    batch_size: int | None
    """The largest smaller batch that fits; none if not even one image a process does."""
    crop: Size | None
    """The largest smaller crop of the same shape that fits."""


def out_of_memory(run: Run, stage: str) -> str:
    """Message for a stage that ran out of memory on the run's device."""
    start = f"{stage}: {run.device} has not enough memory"
    plain = f"{start}; lower {stage}.batch_size"
    if stage not in TRAINING:
        return plain
    try:
        available = available_bytes(run.device)
        fit = what_fits(run.config, stage, available, _predictor(run, stage), run.ranks.world)
    # A network of a plug-in space may not run on tensors without data. The message comes anyway.
    except Exception as error:
        return f"{plain} (the memory model failed: {type(error).__name__})"
    batch, crop = _batch_size(run.config, stage), _crop(run.config, stage)
    verdict = (
        f"{start}: by the memory model a step takes {_gib(fit.needed)} of {_gib(available)} GiB "
        f"with {stage}.batch_size = {batch} and {_setting(stage, crop)}"
    )
    if fit.needed <= (1 - SPARE) * available:
        remedy = 'data.cache = "ram" may help, or a smaller batch'
        return f"{verdict}. Something else is in the way: {remedy}"
    advice = []
    if fit.batch_size is not None:
        advice.append(f"{stage}.batch_size = {fit.batch_size}{_accumulation(run, stage, fit)}")
    if fit.crop is not None:
        advice.append(_setting(stage, fit.crop))
    return f"{verdict}. {' or '.join(advice) or 'No batch and no crop'} would fit"


def what_fits(
    config: RunConfig, stage: str, available: int, predict: Predict, processes: int = 1
) -> Fit:
    """`predict`: bytes of a step of a configuration; linear in images and in pixels of the crop."""
    needed, usable = predict(config), (1 - SPARE) * available
    return Fit(
        needed,
        _fitting_batch(config, stage, usable, needed, predict, processes),
        _fitting_crop(config, stage, usable, needed, predict),
    )


def available_bytes(device: torch.device) -> int:
    """What this process could have at most: what is free and what it holds already."""
    if device.type != "cuda":
        return free_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _predictor(run: Run, stage: str) -> Predict:
    classes, genotype = run.num_classes, None
    if stage != "search":
        genotype = run.genotype()
    if stage == "pretrain":
        pretrain = run.config.pretrain
        classes = len(open_classes(pretrain, "train", pretrain.image_size).classes)

    def predict(config: RunConfig) -> int:
        return step_memory(
            config, stage, classes, run.precision, run.device, genotype, run.ranks.world
        ).total

    return predict


def _fitting_batch(
    config: RunConfig, stage: str, usable: float, needed: int, predict: Predict, processes: int
) -> int | None:
    most = _batch_size(config, stage)
    half = max(processes, most // (2 * processes) * processes)
    if half == most:
        return None
    image = (needed - predict(_with(config, stage, batch_size=half))) / (most - half)
    fitting = int((usable - (needed - image * most)) / image) // processes * processes
    return min(fitting, most - processes) if fitting >= processes else None


def _fitting_crop(
    config: RunConfig, stage: str, usable: float, needed: int, predict: Predict
) -> Size | None:
    height, width = _crop(config, stage)
    half = (max(1, height // 2), max(1, width // 2))
    area = height * width
    pixel = (needed - predict(_with_crop(config, stage, half))) / (area - half[0] * half[1])
    share = (usable - (needed - pixel * area)) / (pixel * area)
    if share <= 0:
        return None
    factor = min(1.0, math.sqrt(share))
    fitting = tuple(_on_grid(side, side * factor) for side in (height, width))
    return (fitting[0], fitting[1]) if min(fitting) > 0 else None


def _on_grid(side: int, most: float) -> int:
    """The largest 16 k + 1 (where the side is one) or 32 k up to `most`; 0 if there is none."""
    if side % 16 == 1:
        return int((most - 1) // 16) * 16 + 1 if most >= 17 else 0
    return int(most // 32) * 32


def _accumulation(run: Run, stage: str, fit: Fit) -> str:
    if stage == "pretrain" or fit.batch_size is None:
        return ""
    section = getattr(run.config, stage)
    factor = section.accumulate * section.batch_size / fit.batch_size
    return f" (with {stage}.accumulate = {round(factor)} for about as many images a step)"


def _batch_size(config: RunConfig, stage: str) -> int:
    size: int = getattr(config, stage).batch_size
    return size


def _crop(config: RunConfig, stage: str) -> Size:
    if stage == "pretrain":
        return (config.pretrain.image_size, config.pretrain.image_size)
    crop: Size = getattr(config, stage).augmentation.crop
    return crop


def _setting(stage: str, crop: Size) -> str:
    if stage == "pretrain":
        return f"pretrain.image_size = {min(crop)}"
    return f"{stage}.augmentation.crop = [{crop[0]}, {crop[1]}]"


def _with_crop(config: RunConfig, stage: str, crop: Size) -> RunConfig:
    if stage == "pretrain":
        return _with(config, stage, image_size=min(crop))
    augmentation = getattr(config, stage).augmentation.model_copy(update={"crop": crop})
    return _with(config, stage, augmentation=augmentation)


def _with(config: RunConfig, stage: str, **changes: object) -> RunConfig:
    section = getattr(config, stage).model_copy(update=changes)
    return config.model_copy(update={stage: section})


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"

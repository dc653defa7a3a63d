"""All stages of a run in their order, for one seed or several."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lgcnet_fast.config import RunConfig
from lgcnet_fast.data.class_folder import open_classes
from lgcnet_fast.errors import RunError
from lgcnet_fast.train.derive import derive, given_genotype
from lgcnet_fast.train.evaluate import evaluate
from lgcnet_fast.train.finetune import coarse_splits, finetune
from lgcnet_fast.train.memory_hint import out_of_memory
from lgcnet_fast.train.prediction import latency_predictor
from lgcnet_fast.train.pretrain import pretrain
from lgcnet_fast.train.run import Run, write_json
from lgcnet_fast.train.search import search
from lgcnet_fast.train.trial import check_batches

STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "search": search,
    "derive": derive,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
}


def run_stage(run: Run, name: str) -> dict[str, Any]:
    """Headline numbers of one stage; runs it unless it is done, continuing where it stopped."""
    result = run.stage_result(name)
    if result is not None:
        return result
    try:
        return STAGES[name](run)
    except torch.OutOfMemoryError as error:
        raise RunError(out_of_memory(run, name)) from error


def run_all(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Runs every unfinished stage of every seed; writes and returns the summary.

    One seed lives in `folder` itself, several in `folder/seed-N`. Everything that can be refused
    is refused before the first stage.
    """
    runs = open_runs(folder, config)
    check(runs[0])
    for run in runs:
        for name in STAGES:
            run_stage(run, name)
    summary = summarise(runs)
    if runs[0].ranks.first:
        write_json(folder / "summary.json", summary)
    return summary


def open_runs(folder: Path, config: RunConfig) -> list[Run]:
    """The run of each seed; raises `RunError` if the folder holds another kind of run."""
    several = len(config.seeds) > 1
    if several and (folder / "config.json").exists():
        raise RunError(f"{folder}: holds a run of one seed; use another run folder for several")
    folders = {seed: folder / f"seed-{seed}" if several else folder for seed in config.seeds}
    return [Run(path, config, seed) for seed, path in folders.items()]


def check(run: Run) -> None:
    """Raises the error that a later stage would raise: data, table, target, genotype, batches."""
    config = run.config
    splits = (*config.data.train_splits, config.data.val_split, *coarse_splits(config))
    # The fingerprint looks at every file, so that none is found missing after hours.
    for split in dict.fromkeys(splits):
        run.dataset(split).fingerprint()
    if config.pretrain.enabled:
        for split in ("train", "val"):
            open_classes(config.pretrain, split, config.pretrain.image_size).fingerprint()
    predictor = latency_predictor(run)
    if config.genotype is not None:
        predictor.milliseconds(given_genotype(run))
    check_batches(run)


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Genotype latency, parameters and mIoU of each seed, with mean and standard deviation."""
    seeds = {str(run.seed): _headline(run) for run in runs}
    columns = {key: [row[key] for row in seeds.values()] for key in next(iter(seeds.values()))}
    return {
        "seeds": seeds,
        "mean": {key: statistics.fmean(values) for key, values in columns.items()},
        "std": {
            key: statistics.stdev(values) if len(values) > 1 else None
            for key, values in columns.items()
        },
    }


def _headline(run: Run) -> dict[str, float]:
    derived, evaluated = run_stage(run, "derive"), run_stage(run, "evaluate")
    scores = {f"miou_{name}": values["miou"] for name, values in evaluated["protocols"].items()}
    return {
        "latency_ms": derived["latency_ms"],
        "fps": derived["fps"],
        "parameters": derived["parameters"],
        **scores,
    }

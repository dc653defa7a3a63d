"""The trained network of a run folder, read without any training code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lgcnet_fast.config import RunConfig, explain, validate_config
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.deploy.class_list import ClassList
from lgcnet_fast.errors import RunError
from lgcnet_fast.space.genotype import Genotype, load_genotype
from lgcnet_fast.space.registry import make_space


@dataclass(frozen=True)
class TrainedRun:
    """What is left of a run once it is trained."""

    config: RunConfig
    genotype: Genotype
    classes: ClassSet
    network: nn.Module
    """The derived network with its finetuned weights: float32, on the CPU, in eval mode."""


def read_trained_run(folder: Path) -> TrainedRun:
    """Raises `RunError` if `folder` is no finetuned run of one seed or a file of it is damaged."""
    config = _read_config(folder)
    # Naming the space makes a plug-in's genotypes known.
    space = make_space(config.space)
    genotype = load_genotype(_present(folder / "genotype.json", "derive"))
    classes = _read_classes(folder / "classes.json")
    network = space.build(genotype, len(classes))
    _load_weights(network, _present(folder / "finetune" / "weights.safetensors", "finetune"))
    return TrainedRun(config, genotype, classes, network.eval())


def _read_config(folder: Path) -> RunConfig:
    path = folder / "config.json"
    if not path.is_file():
        seeds = sorted(str(inside.parent) for inside in folder.glob("seed-*/config.json"))
        remedy = f"; it holds several seeds: name one of {', '.join(seeds)}" if seeds else ""
        raise RunError(f"{folder}: not a run folder (it has no config.json){remedy}")
    return validate_config(_read_json(path), str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged ({error}); restore it from the run") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: not a JSON object; restore it from the run")
    return values


def _read_classes(path: Path) -> ClassSet:
    _present(path, "finetune")
    try:
        return ClassList.model_validate(_read_json(path)).class_set()
    except ValidationError as error:
        fault = explain(error, ClassList)
        raise RunError(f"{path}: damaged: {fault}; restore it from the run") from None


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{path}: damaged ({error}); run the stage finetune again") from None
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        first_fault = str(error).splitlines()[1].strip()
        raise RunError(
            f"{path}: belongs to another network ({first_fault}); run the stage finetune again"
        ) from None


def _present(path: Path, stage: str) -> Path:
    if not path.is_file():
        raise RunError(f"{path}: missing; run the stage {stage} first")
    return path

"""Reading a run folder: its configuration, genotype, classes and weights, each checked by itself.

No training code is needed, so that applications and the stages of training read the same way.
"""

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
    config = read_config(folder)
    # Naming the space makes a plug-in's genotypes known.
    space = make_space(config.space)
    genotype = read_genotype(folder)
    classes = read_classes(folder)
    network = space.build(genotype, len(classes))
    load_weights(network, weights_path(folder, "finetune"))
    return TrainedRun(config, genotype, classes, network.eval())


def seed_folders(folder: Path) -> list[Path]:
    """`folder` itself, or its seed-N folders by N. Raises `RunError` if it holds no run."""
    if (folder / "config.json").is_file():
        return [folder]
    inside = [path.parent for path in folder.glob("seed-*/config.json")]
    if not inside:
        raise RunError(
            f"{folder}: not a run folder (it has no config.json); `lgcnet run --out {folder}` "
            "begins one"
        )
    return sorted(inside, key=lambda path: (len(path.name), path.name))


def read_config(folder: Path) -> RunConfig:
    """Raises `RunError` if `folder` is no run of one seed, `ConfigError` if its file is invalid."""
    path = folder / "config.json"
    if not path.is_file():
        names = ", ".join(str(path) for path in seed_folders(folder))
        raise RunError(f"{folder}: holds a run for each seed; name one of {names}")
    return validate_config(read_json(path, "restore it, or use another run folder"), str(path))


def read_genotype(folder: Path) -> Genotype:
    """Of a space that is registered or has been named. Raises `RunError` or `GenotypeError`."""
    path = folder / "genotype.json"
    if not path.is_file():
        raise RunError(f"{path}: missing; {rerun(folder / 'derive')}")
    return load_genotype(path)


def read_classes(folder: Path) -> ClassSet:
    """Raises `RunError` if the file is missing or damaged, or its lists do not fit together."""
    path = folder / "classes.json"
    remedy = f"`lgcnet run {folder}` writes it again from the data set"
    if not path.is_file():
        raise RunError(f"{path}: missing; {remedy}")
    remedy = f"delete it, and {remedy}"
    try:
        return ClassList.model_validate(read_json(path, remedy)).class_set()
    except ValidationError as error:
        raise RunError(f"{path}: damaged: {explain(error, ClassList)}; {remedy}") from None


def weights_path(folder: Path, stage: str) -> Path:
    """The trained network of `pretrain` (its backbone) or `finetune`."""
    return folder / stage / "weights.safetensors"


def load_weights(network: nn.Module, path: Path) -> None:
    """Those of a `weights_path`. Raises `RunError` if missing, damaged or of another network."""
    if not path.is_file():
        raise RunError(f"{path}: missing; {rerun(path.parent)}")
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{path}: damaged ({error}); {rerun(path.parent)}") from None
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        first_fault = str(error).splitlines()[1].strip()
        raise RunError(
            f"{path}: belongs to another network ({first_fault}); {rerun(path.parent)}"
        ) from None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Raises `RunError` with `remedy` if the file is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: not a JSON object; {remedy}")
    return values


def rerun(stage_folder: Path) -> str:
    """How to get a missing file of a stage: a stage that is marked as done is not run again."""
    done = stage_folder / "done.json"
    first = f"delete {done} and " if done.exists() else ""
    return f"{first}run the stage {stage_folder.name} first"

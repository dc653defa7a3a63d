"""The device-independent half of an engine, and the file that holds it.

An engine file is a safetensors file of the folded weights. Its metadata hold format, version, a
JSON description (genotype, classes, input size) and a digest of description and weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lgcnet_fast.config import Size, explain
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.deploy.class_list import ClassList
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.program import FoldedNetwork
from lgcnet_fast.deploy.run_folder import read_trained_run
from lgcnet_fast.errors import EngineError
from lgcnet_fast.files import replacing
from lgcnet_fast.space.genotype import Genotype, parse_genotype
from lgcnet_fast.space.registry import registered_spaces

FORMAT = "lgcnet-engine"
VERSION = "1"


@dataclass(frozen=True)
class Blueprint:
    """Everything that an engine needs to know, on any device."""

    genotype: Genotype
    classes: ClassSet
    size: Size | None
    """(height, width) of the network's input; none: the size of each image."""
    network: FoldedNetwork
    """float32, on the CPU."""


class Description(BaseModel):
    """The JSON in an engine file."""

    model_config = ConfigDict(extra="forbid")

    genotype: dict[str, Any]
    classes: ClassList
    size: Size | None


def run_blueprint(folder: Path) -> Blueprint:
    """Of the finetuned network of a run folder, at its evaluation size. Raises `RunError`."""
    run = read_trained_run(folder)
    return Blueprint(run.genotype, run.classes, run.config.evaluate.size, fold(run.network))


def save_blueprint(blueprint: Blueprint, path: Path) -> None:
    """Writes an engine file, whole or not at all. Raises `EngineError` if it cannot."""
    description = json.dumps(
        {
            "genotype": blueprint.genotype.model_dump(mode="json"),
            "classes": ClassList.of(blueprint.classes).model_dump(mode="json"),
            "size": blueprint.size,
        }
    )
    tensors = dict(blueprint.network.state_dict())
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "description": description,
        "digest": _digest(description, tensors),
    }
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{path}: cannot be written ({error}); choose another path") from None


def load_blueprint(path: Path) -> Blueprint:
    """Raises `EngineError` if the file is missing, damaged, altered or of another version.

    The file's genotype picks among the registered spaces; nothing is imported on its behalf.
    """
    metadata, tensors = _read(path)
    description_text = metadata["description"]
    if metadata["digest"] != _digest(description_text, tensors):
        raise EngineError(
            f"{path}: was altered after it was written (its digest differs); save it again from "
            "its run"
        )
    description = _parse(description_text, path)
    genotype = parse_genotype(json.dumps(description.genotype).encode(), f"{path}: genotype")
    classes = description.classes.class_set()
    network = registered_spaces()[genotype.space].build(genotype, len(classes)).eval()
    folded = fold(network)
    _fill(folded, tensors, path)
    return Blueprint(genotype, classes, description.size, folded)


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """Metadata and tensors of an engine file of this version."""
    if not path.is_file():
        raise EngineError(f"{path}: no such engine file or run folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(metadata, path)
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except EngineError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise EngineError(
            f"{path}: damaged or not an engine file ({error}); save it again from its run"
        ) from None


def _check_version(metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise EngineError(
            f"{path}: a safetensors file, but not an engine; give a run folder or the file of "
            "Segmenter.save"
        )
    version = metadata.get("version")
    if version != VERSION:
        raise EngineError(
            f"{path}: engine version {version}, this program reads {VERSION}; save it again from "
            "its run"
        )
    for key in ("description", "digest"):
        if key not in metadata:
            raise EngineError(f"{path}: damaged: it lacks its {key}; save it again from its run")


def _parse(text: str, path: Path) -> Description:
    try:
        return Description.model_validate_json(text)
    except ValidationError as error:
        fault = explain(error, Description)
        raise EngineError(f"{path}: damaged: {fault}; save it again from its run") from None


def _fill(network: FoldedNetwork, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies the weights; names the first that is missing, superfluous or of another shape."""
    expected = network.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        fault = "lacks" if name in expected else "has no use for"
        raise EngineError(f"{path}: its network {fault} {name!r}; save it again from its run")
    for name, weight in expected.items():
        given = tensors[name]
        if given.shape != weight.shape or given.dtype != weight.dtype:
            raise EngineError(
                f"{path}: {name} is {given.dtype} {tuple(given.shape)}, the network of its "
                f"genotype and classes has {weight.dtype} {tuple(weight.shape)}; save it again "
                "from its run"
            )
    network.load_state_dict(tensors)


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

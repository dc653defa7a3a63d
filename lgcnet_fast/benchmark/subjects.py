"""What can be benchmarked, by how a user names it."""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lgcnet_fast.benchmark.engines import unnamed_classes
from lgcnet_fast.benchmark.networks import random_network, settle_batch_norms
from lgcnet_fast.config import Size
from lgcnet_fast.deploy.blueprint import Blueprint, load_blueprint
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.run_folder import read_trained_run
from lgcnet_fast.errors import ConfigError, UserError
from lgcnet_fast.space.genotype import load_genotype, named_genotypes

Kind = Literal["run", "engine", "genotype", "module", "onnx"]


@dataclass(frozen=True)
class Subject:
    name: str
    kind: Kind
    network: nn.Module | None = None
    """In plain PyTorch: float32, on the CPU, in eval mode; none of ONNX files."""
    blueprint: Blueprint | None = None
    """Of networks that can be deployed."""
    file: Path | None = None
    """Of ONNX files."""
    size: Size | None = None
    """Input size that the subject was made for, if it says so."""
    miou: float | None = None
    """Percent on the validation images of its run, where that is known."""

    @property
    def parameters(self) -> int | None:
        return sum(p.numel() for p in self.network.parameters()) if self.network else None


def open_subject(text: str, num_classes: int = 19) -> Subject:
    """A run folder, engine file, genotype (name or JSON file), `package.module:factory` or .onnx.

    num_classes: of genotypes, which get random weights. Raises a `UserError` naming what is wrong.
    """
    path = Path(text)
    if text in named_genotypes() or path.suffix == ".json":
        return _of_genotype(text, num_classes)
    if path.suffix == ".onnx":
        return _of_onnx(path)
    if path.is_dir():
        return _of_run(path)
    if path.is_file():
        return _of_engine(path)
    if ":" in text:
        return Subject(text, "module", import_network(text))
    near = difflib.get_close_matches(text, named_genotypes(), n=1, cutoff=0)[0]
    raise ConfigError(
        f"{text}: no such run folder, engine or ONNX file; a genotype is a name such as {near!r} "
        "or a JSON file, a PyTorch module is named as package.module:factory"
    )


def import_network(name: str) -> nn.Module:
    """What `package.module:factory` returns, or the module that it names; in eval mode.

    The working folder counts as a place to import from. Raises `ConfigError`.
    """
    module_name, _, attribute = name.partition(":")
    with _working_folder_importable():
        try:
            found = getattr(importlib.import_module(module_name), attribute, None)
        # Whatever the code of a user raises at import is for the user to see.
        except Exception as error:
            raise ConfigError(f"{name}: cannot import {module_name!r}: {_told(error)}") from error
        if found is None:
            raise ConfigError(f"{name}: {module_name!r} has no {attribute!r}")
        network = found if isinstance(found, nn.Module) else _made_by(found, name)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"{name}: gives a {type(network).__name__}; a torch.nn.Module is needed, or a function "
            "without arguments that returns one"
        )
    return network.eval()


def _made_by(factory: object, name: str) -> object:
    if not callable(factory):
        return factory
    try:
        return factory()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: called without arguments it raised {_told(error)}") from error


def _told(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """As `python -m` has it, and the installed command has not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _of_genotype(text: str, num_classes: int) -> Subject:
    genotype = load_genotype(text)
    network = random_network(genotype, num_classes)
    settle_batch_norms(network)
    blueprint = Blueprint(genotype, unnamed_classes(num_classes), None, fold(network))
    return Subject(short_name(text), "genotype", network, blueprint)


def _of_run(folder: Path) -> Subject:
    run = read_trained_run(folder)
    size = run.config.evaluate.size
    blueprint = Blueprint(run.genotype, run.classes, size, fold(run.network))
    miou = _evaluated_miou(folder)
    return Subject(short_name(folder), "run", run.network, blueprint, size=size, miou=miou)


def _evaluated_miou(folder: Path) -> float | None:
    """Of the protocol `full`; none where the run has not been evaluated so."""
    try:
        scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        return 100 * float(scores["protocols"]["full"]["miou"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_engine(path: Path) -> Subject:
    blueprint = load_blueprint(path)
    network = blueprint.network.eval()
    return Subject(short_name(path), "engine", network, blueprint, size=blueprint.size)


def _of_onnx(path: Path) -> Subject:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    return Subject(short_name(path), "onnx", file=path)


def short_name(path: str | Path) -> str:
    """The last two parts, so that results tell nothing about one machine's folders."""
    return "/".join(part for part in Path(path).parts[-2:] if part != "/")

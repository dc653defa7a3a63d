"""Genotypes: frozen descriptions of one network of a search space, as versioned JSON."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lgcnet_fast.config import explain
from lgcnet_fast.errors import GenotypeError
from lgcnet_fast.files import replacing

MAX_BYTES = 1_000_000
"""A genotype has a few kilobytes; larger files are not read."""


class Genotype(BaseModel):
    """What every space's genotype has; a space adds its own fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    space: str


def named_genotypes() -> tuple[str, ...]:
    """Genotypes that come with the package."""
    folder = resources.files("lgcnet_fast.space").joinpath("genotypes")
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def load_genotype(name: str | Path) -> Genotype:
    """A shipped genotype by name, or the JSON file at a path.

    The file's `space` picks among the registered search spaces; nothing is imported on its behalf.
    Raises `GenotypeError` naming the file, the place in it and what is wrong.
    """
    if str(name) in named_genotypes():
        shipped = resources.files("lgcnet_fast.space").joinpath("genotypes", f"{name}.json")
        return parse_genotype(shipped.read_bytes(), f"genotype {name}")
    path = Path(name)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise GenotypeError(f"{name}: cannot read the genotype: {error}{_nearest(name)}") from None
    return parse_genotype(content, str(name))


def parse_genotype(content: bytes, source: str) -> Genotype:
    """Validates the JSON text of a genotype; `source` opens the messages of `GenotypeError`."""
    # The registry knows all spaces, each of which builds on this module.
    from lgcnet_fast.space.registry import registered_spaces

    values = _parse_json(content, source)
    space = values.get("space")
    spaces = registered_spaces()
    if not isinstance(space, str) or space not in spaces:
        near = difflib.get_close_matches(str(space)[:40], spaces, n=1, cutoff=0)[0]
        raise GenotypeError(
            f"{source}: space: unknown search space {str(space)[:40]!r}; did you mean {near!r}? "
            f"A plug-in is known once a configuration has named it"
        )
    if "version" not in values:
        raise GenotypeError(f"{source}: version: missing; this program writes version 1")
    model = spaces[space].Genotype
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise GenotypeError(f"{source}: {explain(error, model)}") from None


def save_genotype(genotype: Genotype, path: str | Path) -> None:
    """Writes JSON that `load_genotype` reads; the file appears whole or not at all."""
    text = json.dumps(genotype.model_dump(mode="json"), indent=1) + "\n"
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _parse_json(content: bytes, source: str) -> dict[str, Any]:
    if len(content) > MAX_BYTES:
        raise GenotypeError(f"{source}: over {MAX_BYTES} bytes, so not a genotype")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise GenotypeError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise GenotypeError(f"{source}: must be a JSON object, is a {type(values).__name__}")
    return values


def _nearest(name: str | Path) -> str:
    near = difflib.get_close_matches(str(name), named_genotypes(), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""

"""Tuning tables: what was measured to be best on a device, one JSON file a device name.

A table names the backend that `auto` takes for an operation, and for an operation and shape key
the launch configuration; whatever it does not hold runs with the launcher's defaults. `tables/`
holds the committed ones. bench/tune.py measures and calls `write_table(TuningTable(...))`, with
keys made by the `shape_key` that the operation's wrapper looks up:

    {"format": 1, "device": "NVIDIA H200", "measured": {"torch": "2.11.0", ...},
     "backends": {"upsample": "triton"},
     "configs": {"upsample": {"bfloat16 16x48x32x64 128x256": {"block": 1024, "rows": 4}}}}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lgcnet_fast import config
from lgcnet_fast.errors import BackendError
from lgcnet_fast.files import replacing

FOLDER = Path(__file__).with_name("tables")
REMEDY = "python -m bench.tune"

LaunchConfig = dict[str, Annotated[int, Field(strict=True, ge=1, le=2**20)]]
"""Fields of a launcher's configuration: {"block": 1024, "rows": 4, "warps": 4}."""
T = TypeVar("T")


class TuningTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    device: Annotated[str, Field(min_length=1)]
    """As torch.cuda.get_device_name gives it."""
    measured: dict[str, str]
    """Where the numbers come from: versions, driver, commit, command, date."""
    backends: dict[str, Literal["triton", "cuda", "reference"]]
    """By operation."""
    configs: dict[str, dict[str, LaunchConfig]] = {}
    """By operation and shape key."""


def shape_key(dtype: torch.dtype, *shapes: Sequence[int]) -> str:
    """`bfloat16 16x48x32x64 128x256`: a storage dtype and the shapes that decide a tile."""
    return " ".join([str(dtype).removeprefix("torch."), *("x".join(map(str, s)) for s in shapes)])


def table_of(device: torch.device) -> TuningTable | None:
    """The committed table of a GPU; none for the CPU."""
    return _table(_device_name(device)) if device.type == "cuda" else None


def backend_for(operation: str, device: torch.device) -> tuple[str, str | None]:
    """What the table of a GPU names, or the reference and the reason why it names nothing."""
    table = table_of(device)
    if table is None:
        name = _device_name(device)
        return "reference", f"no tuning table for {name} ({REMEDY} makes one)"
    if operation not in table.backends:
        name = table.device
        return "reference", f"{operation} is not in the tuning table of {name} ({REMEDY} adds it)"
    return table.backends[operation], None


def config_for(operation: str, key: str, device: torch.device) -> LaunchConfig | None:
    """The launch configuration for a shape key; None where none was measured."""
    table = table_of(device)
    return table.configs.get(operation, {}).get(key) if table else None


def tuned(default: T, operation: str, key: str, device: torch.device) -> T:
    """A launcher's `default` configuration (a dataclass) with the table's fields laid over it.

    Raises `BackendError` where the table has a field that the launcher has not.
    """
    found = config_for(operation, key, device) or {}
    known: Any = default
    unknown = found.keys() - {field.name for field in fields(known)}
    if unknown:
        raise BackendError(
            f"{table_path(_device_name(device))}: configs.{operation}.{key}: the launcher has no "
            f"{', '.join(sorted(unknown))}; measure anew: {REMEDY}"
        )
    return replace(known, **found) if found else default


def table_path(device_name: str, folder: Path = FOLDER) -> Path:
    """`NVIDIA H200` -> nvidia_h200.json in the folder."""
    stem = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    return folder / f"{stem}.json"


def read_table(path: Path) -> TuningTable:
    """Raises `BackendError` naming the file and each key at fault."""
    try:
        return TuningTable.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BackendError(f"{path}: cannot read the tuning table: {error}") from None
    except ValidationError as error:
        faults = config.explain(error, TuningTable)
        raise BackendError(f"{path}: {faults}\n  measure anew: {REMEDY}") from None


def write_table(table: TuningTable, folder: Path = FOLDER) -> Path:
    """Writes the table of a device whole or not at all, and returns its path.

    From then on it is the one in use in this process too.
    """
    path = table_path(table.device, folder)
    with replacing(path) as temporary:
        temporary.write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _table.cache_clear()
    return path


@cache
def _table(device_name: str) -> TuningTable | None:
    path = table_path(device_name)
    return read_table(path) if path.exists() else None


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)

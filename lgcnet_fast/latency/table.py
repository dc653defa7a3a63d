"""The latency lookup table: one entry for each (operation, channels, size, stride) of a space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lgcnet_fast.config import explain
from lgcnet_fast.errors import TableError
from lgcnet_fast.files import replacing
from lgcnet_fast.space.base import LutKey, SearchSpace

LARGEST_FILE = 64 * 2**20
"""Bytes; the table of a large space has less than one hundredth of that."""
FAULTS_SHOWN = 5
REBUILD = "build the table again with `lgcnet lut build`"

NonNegative = Annotated[float, Field(ge=0, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Provenance(_Record):
    """What a table was made on and with; empty strings where something does not apply."""

    provider: str
    """measured (each operation), measured_batchN, fitted (whole networks), roofline_titanxp."""
    device: str
    driver: str = ""
    torch: str = ""
    cuda: str = ""
    dtype: str = "float32"
    runtime: str
    """What runs the operations: eager, deploy or roofline."""
    backend: str = ""
    """Of deploy, as it was asked for: auto, triton, cuda or reference."""
    batch: Positive = 1
    """Images a run; entries are for one image."""


class Entry(_Record):
    """Latency of one key, milliseconds an image."""

    op: str
    c_in: Whole
    c_out: Whole
    h_in: Whole
    w_in: Whole
    stride: Whole
    median_ms: NonNegative
    spread: NonNegative = 0.0
    """Half the width of the median's 95 % interval by the median; of fitted entries, of the cost:
    wide where only sums with other entries, such as the constant part, are known."""
    runs: Positive = 1
    """Of fitted entries the networks that have it."""
    capped: bool = False
    """Whether the time limit ended the measurement before the interval was narrow enough."""

    @property
    def key(self) -> LutKey:
        return LutKey(self.op, self.c_in, self.c_out, self.h_in, self.w_in, self.stride)


class Fit(_Record):
    """How a table was fitted to whole networks, and how well it predicts those left out."""

    networks: Positive
    seconds: NonNegative
    median_error: NonNegative
    """Relative, each network predicted from a fit without it and a fifth of the others."""
    worst_error: NonNegative
    genotypes: tuple[str, ...]
    """Fingerprints, so that none of them serves as a test."""


class LookupTable(_Record):
    """Median latencies of one space at one input size, on one device."""

    version: Literal[1] = 1
    made_on: Provenance
    space: str
    options: dict[str, Any]
    """The space's options, so that a table for another network is recognised."""
    size: tuple[Positive, Positive]
    """Input (height, width)."""
    num_classes: Positive
    entries: tuple[Entry, ...]
    fit: Fit | None = None
    """Of tables of whole engines; entries then hold what an operation adds to an engine."""

    @model_validator(mode="after")
    def _one_entry_a_key(self) -> LookupTable:
        repeated = [key for key, count in Counter(e.key for e in self.entries).items() if count > 1]
        if repeated:
            raise ValueError(f"more than one entry for '{repeated[0]}'")
        return self

    @property
    def milliseconds(self) -> Mapping[LutKey, float]:
        return MappingProxyType({entry.key: entry.median_ms for entry in self.entries})

    @property
    def description(self) -> str:
        """Device, runtime and numeric type in one line."""
        made = self.made_on
        backend = f", backend {made.backend}" if made.backend else ""
        return f"{made.device}, {made.runtime} ({made.provider}){backend}, {made.dtype}"


def make_entry(
    key: LutKey, median_ms: float, spread: float = 0.0, runs: int = 1, capped: bool = False
) -> Entry:
    return Entry(**asdict(key), median_ms=median_ms, spread=spread, runs=runs, capped=capped)


def save_table(table: LookupTable, path: Path) -> None:
    """Atomic: a reader finds the old table or the new one. Raises `TableError`."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TableError(f"{path}: cannot write the latency table: {error.strerror}") from None


def load_table(path: Path) -> LookupTable:
    """Raises `TableError` naming the file and what is wrong in it."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise TableError(f"{path}: too large for a latency table; {REBUILD}")
        text = path.read_bytes()
    except OSError as error:
        raise TableError(
            f"{path}: cannot read the latency table: {error.strerror}; {REBUILD}"
        ) from None
    try:
        return LookupTable.model_validate_json(text)
    except ValidationError as error:
        faults = _first_lines(explain(error, LookupTable))
        raise TableError(f"{path}: not a usable latency table: {faults}\n  {REBUILD}") from None


def check_table(
    table: LookupTable,
    source: str,
    space: SearchSpace,
    size: tuple[int, int],
    num_classes: int,
    device: str,
) -> tuple[str, ...]:
    """Warnings about using `table` for a run; raises `TableError` where it cannot serve.

    It cannot if it is for another space or input size or lacks entries. Another device, or other
    options of the space, are warnings: the entries that are there may still be the right ones.
    `device` is the name of the run's GPU, or empty.
    """
    if table.space != space.name:
        raise TableError(
            f"{source}: built for space {table.space!r}, not {space.name!r}; {REBUILD}"
        )
    if tuple(table.size) != tuple(size):
        raise TableError(
            f"{source}: built for input {_size(table.size)}, but latency.size is {_size(size)}; "
            f"set latency.size to that, or {REBUILD}"
        )
    wanted = space.engine_keys if table.fit else space.lut_keys
    keys = dict.fromkeys(wanted(size, num_classes))
    known = table.milliseconds
    missing = [key for key in keys if key not in known]
    if missing:
        raise TableError(
            f"{source}: lacks {len(missing)} of {len(keys)} entries, the first '{missing[0]}'; "
            f"{REBUILD}"
        )
    warnings = []
    if table.made_on.runtime != "roofline" and device and device != table.made_on.device:
        warnings.append(f"{source}: measured on {table.made_on.device}, this is {device}")
    now = space.options.model_dump(mode="json")
    differing = sorted(key for key in now if table.options.get(key) != now[key])
    if differing:
        warnings.append(f"{source}: built with other space options: {', '.join(differing)}")
    return tuple(warnings)


def _first_lines(text: str) -> str:
    """A table of a thousand wrong entries is described by the first few."""
    lines = text.splitlines()
    more = [f"  and {len(lines) - FAULTS_SHOWN} more"] if len(lines) > FAULTS_SHOWN else []
    return "\n".join(lines[:FAULTS_SHOWN] + more)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

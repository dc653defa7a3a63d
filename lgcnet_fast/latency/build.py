"""Building a table: every key of a space, each once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lgcnet_fast.latency.hardware import device_name
from lgcnet_fast.latency.providers import (
    ROOFLINE,
    LatencyProvider,
    RooflineProvider,
)
from lgcnet_fast.latency.shipped import find_table
from lgcnet_fast.latency.table import (
    Entry,
    LookupTable,
    check_table,
    make_entry,
)
from lgcnet_fast.space.base import LutKey, SearchSpace


def build_table(
    space: SearchSpace,
    size: tuple[int, int],
    num_classes: int,
    provider: LatencyProvider,
    progress: Callable[[int, int], None] | None = None,
) -> LookupTable:
    """Asks `provider` for every key of `space` at input `size` (height, width).

    `progress` is called with the number of entries so far and of all.
    """
    keys = tuple(dict.fromkeys(space.lut_keys(size, num_classes)))
    entries: list[Entry] = []
    for key in keys:
        entries.append(_entry(space, key, provider))
        if progress is not None:
            progress(len(entries), len(keys))
    return LookupTable(
        made_on=provider.provenance(),
        space=space.name,
        options=space.options.model_dump(mode="json"),
        size=size,
        num_classes=num_classes,
        entries=tuple(entries),
    )


def open_table(
    name: str, space: SearchSpace, size: tuple[int, int], num_classes: int, device: torch.device
) -> tuple[LookupTable, tuple[str, ...]]:
    """The table that `latency.table` names and warnings about it.

    name: a file's path, a shipped table, or the roofline. Raises `TableError` where it cannot
    serve the run.
    """
    if name == ROOFLINE:
        return build_table(space, size, num_classes, RooflineProvider()), ()
    table = find_table(name)
    return table, check_table(table, name, space, size, num_classes, device_name(device))


def _entry(space: SearchSpace, key: LutKey, provider: LatencyProvider) -> Entry:
    timed = provider.measure(space.lut_module(key))
    return make_entry(key, timed.median_ms, timed.spread, timed.runs, timed.capped)

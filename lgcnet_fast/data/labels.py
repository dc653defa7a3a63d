"""From what mask files hold, ids or colours, to train ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lgcnet_fast.data.classes import IGNORE, Colour
from lgcnet_fast.data.faults import FileFault
from lgcnet_fast.data.image_io import read_colour_mask, read_mask

MAX_ID = 65535
_OTHER = MAX_ID + 1
"""Entry of the lookup table that stands for ids beyond it."""


class IdLabels:
    """Reads masks of ids. `train_ids` maps every id that may occur to a train id, or to 255."""

    def __init__(self, train_ids: Mapping[int, int]) -> None:
        self.train_ids = dict(sorted(train_ids.items()))
        self._table = np.full(_OTHER + 1, -1, np.int16)
        self._table[list(train_ids)] = list(train_ids.values())

    def __call__(self, path: Path) -> NDArray[np.uint8]:
        """uint8 (height, width) train ids. Raises `DataError` naming the file and the odd ids."""
        raw = read_mask(path)
        index = raw
        if raw.dtype == np.int32:
            index = np.where((raw >= 0) & (raw <= MAX_ID), raw, _OTHER)
        mapped = self._table[index]
        odd = mapped < 0
        if odd.any():
            raise _odd_ids(path, raw[odd], self.train_ids)
        return mapped.astype(np.uint8)

    def __repr__(self) -> str:
        return f"ids {self.train_ids}"


class ColourLabels:
    """Reads masks of colours. `train_ids` maps every colour that may occur to a train id or 255."""

    def __init__(self, train_ids: Mapping[Colour, int]) -> None:
        self.train_ids = dict(sorted(train_ids.items()))
        self._colours = _pack(np.array(list(self.train_ids), np.uint8))
        self._targets = np.array(list(self.train_ids.values()), np.uint8)

    def __call__(self, path: Path) -> NDArray[np.uint8]:
        """uint8 (height, width) train ids. Raises `DataError` naming the file and an odd colour."""
        colours = read_colour_mask(path)
        packed = _pack(colours)
        nearest = np.searchsorted(self._colours, packed).clip(max=len(self._colours) - 1)
        odd = self._colours[nearest] != packed
        if odd.any():
            raise _odd_colours(path, colours[odd])
        return self._targets[nearest]

    def __repr__(self) -> str:
        return f"colours {self.train_ids}"


def ids_of(output_ids: tuple[int, ...], ignored: tuple[int, ...] | range = ()) -> dict[int, int]:
    """Train id of each label id; those in `ignored` that have no class become 255."""
    return {**dict.fromkeys(ignored, IGNORE), **{raw: t for t, raw in enumerate(output_ids)}}


def _pack(colours: NDArray[np.uint8]) -> NDArray[np.int32]:
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _odd_ids(path: Path, odd: NDArray[np.integer], known: Mapping[int, int]) -> FileFault:
    values, counts = np.unique(odd, return_counts=True)
    fault = "unknown " + _listing([f"id {value}" for value in values], counts)
    return FileFault(path, fault, f"correct the mask, its ids may be {_ranges(known)}")


def _odd_colours(path: Path, odd: NDArray[np.uint8]) -> FileFault:
    values, counts = np.unique(odd, axis=0, return_counts=True)
    fault = "unknown " + _listing([f"colour {tuple(value.tolist())}" for value in values], counts)
    return FileFault(path, fault, "correct these pixels or give the colour a class")


def _listing(values: list[str], counts: NDArray[np.integer], shown: int = 5) -> str:
    listed = [f"{v} ({n} pixels)" for v, n in zip(values, counts.tolist(), strict=True)]
    more = f" and {len(values) - shown} more" if len(values) > shown else ""
    return ", ".join(listed[:shown]) + more


def _ranges(ids: Mapping[int, int]) -> str:
    """`0-11, 255` for the keys 0..11 and 255."""
    runs: list[list[int]] = []
    for value in sorted(ids):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)

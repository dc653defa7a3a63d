"""The file format of the packed cache: decoded pixels in one flat file, and a JSON index.

`KEY.json` names the state it was made from (fingerprint) and the size and checksum of every item;
`KEY-FINGERPRINT.bin` holds, item after item, the image (height, width, 3) and, in caches with
labels, the label (height, width), all uint8. The index is renamed into place last, so that a
cache is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import lgcnet_fast
from lgcnet_fast.errors import DataError

FORMAT = 1


class Item(NamedTuple):
    """One image of the cache."""

    stem: str
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    checksum: int
    """CRC-32 of image and label."""


class Decoded(NamedTuple):
    """What is packed: an image and, where the cache has labels, its label."""

    stem: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8] | None


class PackIndex(BaseModel):
    """Content of the JSON file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int
    version: str
    """Of the package that wrote the file."""
    fingerprint: str
    channels: int
    """Bytes a pixel: 3, or 4 with labels."""
    items: tuple[Item, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each item starts, and the size of the whole file, in bytes."""
        sizes = (item.height * item.width * self.channels for item in self.items)
        return tuple(accumulate(sizes, initial=0))


@dataclass(frozen=True)
class PackFiles:
    """The two files of one cache."""

    folder: Path
    key: str
    fingerprint: str

    @property
    def index(self) -> Path:
        return self.folder / f"{self.key}.json"

    @property
    def data(self) -> Path:
        return self.folder / f"{self.key}-{self.fingerprint[:16]}.bin"

    def read(self) -> PackIndex | str:
        """The index, or why there is no cache to use: missing, stale or damaged."""
        try:
            index = PackIndex.model_validate_json(self.index.read_bytes())
        except FileNotFoundError:
            return "missing"
        except (OSError, ValidationError):
            return "damaged"
        if index.format != FORMAT or index.fingerprint != self.fingerprint:
            return "stale"
        if not self.data.is_file() or self.data.stat().st_size != index.offsets[-1]:
            return "damaged"
        return index

    def write(self, decoded: Iterable[Decoded], channels: int) -> PackIndex:
        """Packs all items. Raises `DataError` where the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            items = self._write_data(decoded)
            index = PackIndex(
                format=FORMAT,
                version=lgcnet_fast.__version__,
                fingerprint=self.fingerprint,
                channels=channels,
                items=items,
            )
            self._write_index(index)
        except OSError as error:
            free = f"{free_bytes(self.folder) / 2**30:.1f} GiB free"
            raise DataError(
                f"{self.folder}: the cache cannot be written ({error.strerror or error}, {free}); "
                "set data.cache_dir to a folder with room"
            ) from None
        self._remove_predecessors()
        return index

    def _write_data(self, decoded: Iterable[Decoded]) -> tuple[Item, ...]:
        items = []
        partial = _partial(self.data)
        try:
            with partial.open("wb") as file:
                for stem, image, label in decoded:
                    parts = [np.ascontiguousarray(p) for p in (image, label) if p is not None]
                    checksum = 0
                    for part in parts:
                        file.write(part.data)
                        checksum = zlib.crc32(part.data, checksum)
                    height, width = image.shape[:2]
                    items.append(Item(stem, height, width, checksum))
            os.replace(partial, self.data)
        finally:
            partial.unlink(missing_ok=True)
        return tuple(items)

    def _write_index(self, index: PackIndex) -> None:
        partial = _partial(self.index)
        try:
            partial.write_text(json.dumps(index.model_dump()))
            os.replace(partial, self.index)
        finally:
            partial.unlink(missing_ok=True)

    def _remove_predecessors(self) -> None:
        for old in self.folder.glob(f"{self.key}-*.bin"):
            if old != self.data:
                old.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A name for writing that no other process uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def free_bytes(folder: Path) -> int:
    """Room on the disk that holds, or will hold, the folder."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

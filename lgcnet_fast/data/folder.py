"""Any folder of images and masks, described by a `dataset.toml` in it (docs/datasets.md)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from lgcnet_fast.config import Section, explain, tomllib
from lgcnet_fast.data.classes import IGNORE, ClassSet, Colour
from lgcnet_fast.data.dataset import FileDataset, Pair, unknown_split
from lgcnet_fast.data.faults import FileFault
from lgcnet_fast.data.labels import MAX_ID, ColourLabels, IdLabels

DESCRIPTION = "dataset.toml"

Id = Annotated[int, Field(strict=True, ge=0, le=MAX_ID)]
Byte = Annotated[int, Field(strict=True, ge=0, le=255)]
Rgb = tuple[Byte, Byte, Byte]
# Windows' separator, the other wildcards of shells, and anything that leaves the folder.
Pattern = Annotated[str, Field(min_length=1, pattern=r"^[^/\\?\[\]\x00][^\\?\[\]\x00]*$")]


class FolderSplit(Section):
    """Patterns whose stars stand for any text without a slash, the same in both."""

    images: Pattern
    labels: Pattern

    @model_validator(mode="after")
    def _alike(self) -> FolderSplit:
        for pattern in (self.images, self.labels):
            if "**" in pattern or ".." in Path(pattern).parts:
                raise ValueError(f"{pattern!r}: neither '**' nor '..' may be used")
        if self.images.count("*") != self.labels.count("*") or "*" not in self.images:
            raise ValueError("images and labels need the same number of stars, at least one")
        return self


class FolderClass(Section):
    name: Annotated[str, Field(min_length=1)]
    colour: Rgb
    ids: Annotated[tuple[Id, ...], Field(min_length=1)] | None = None
    """What masks use for the class; none: its place in the list of classes."""


class FolderDescription(Section):
    """Content of `dataset.toml`."""

    name: Annotated[str, Field(min_length=1)]
    encoding: Literal["ids", "colours"] = "ids"
    """What masks hold."""
    ignore: tuple[Id, ...] | tuple[Rgb, ...] = ()
    """Ids or colours that do not count."""
    splits: Annotated[dict[str, FolderSplit], Field(min_length=1)]
    classes: Annotated[tuple[FolderClass, ...], Field(min_length=1, max_length=IGNORE)]

    @model_validator(mode="after")
    def _consistent(self) -> FolderDescription:
        masks_of_ids = self.encoding == "ids"
        if not all(isinstance(value, int if masks_of_ids else tuple) for value in self.ignore):
            raise ValueError(f'ignore must list {self.encoding}, as encoding = "{self.encoding}"')
        if not masks_of_ids and any(entry.ids for entry in self.classes):
            raise ValueError('ids of classes need encoding = "ids"')
        _check_distinct("class name", [entry.name for entry in self.classes])
        _check_distinct("mask value", [*self.ignore, *self._mask_values()])
        return self

    def _mask_values(self) -> list[int | Colour]:
        if self.encoding == "colours":
            return [entry.colour for entry in self.classes]
        return [value for ids in self.class_ids() for value in ids]

    def class_ids(self) -> list[tuple[int, ...]]:
        return [c.ids if c.ids is not None else (i,) for i, c in enumerate(self.classes)]

    def class_set(self) -> ClassSet:
        colours = np.array([c.colour for c in self.classes], np.uint8)
        output_ids = tuple(ids[0] for ids in self.class_ids())
        return ClassSet(
            self.name, tuple(c.name for c in self.classes), colours, output_ids=output_ids
        )

    def label_reader(self) -> IdLabels | ColourLabels:
        if self.encoding == "colours":
            colours = {entry.colour: i for i, entry in enumerate(self.classes)}
            colours.update((value, IGNORE) for value in self.ignore if isinstance(value, tuple))
            return ColourLabels(colours)
        ids = {value: i for i, values in enumerate(self.class_ids()) for value in values}
        ids.update((value, IGNORE) for value in self.ignore if isinstance(value, int))
        return IdLabels(ids)


def open_folder(root: Path, split: str) -> FileDataset:
    """A split of the folder. Raises `DataError` naming the key of `dataset.toml` at fault."""
    source = root / DESCRIPTION
    description = read_description(source)
    if split not in description.splits:
        raise unknown_split(source, split, tuple(description.splits))
    pairs = _find_pairs(root, description.splits[split])
    if not pairs:
        pattern = description.splits[split].images
        raise FileFault(source, f"no file matches {pattern!r}", f"correct splits.{split}.images")
    classes = description.class_set()
    return FileDataset(description.name, root, split, classes, pairs, description.label_reader())


def read_description(source: Path) -> FolderDescription:
    """Raises `DataError` naming the file and every key at fault."""
    remedy = "docs/datasets.md shows the format"
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
        return FolderDescription.model_validate(values)
    except FileNotFoundError:
        raise FileFault(source, "no such file", "describe the folder in it") from None
    except ValidationError as error:
        raise FileFault(source, explain(error, FolderDescription), remedy) from None
    except tomllib.TOMLDecodeError as error:
        raise FileFault(source, f"not valid TOML: {error}", remedy) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise FileFault(source, f"cannot be read ({type(error).__name__})", remedy) from None


def _check_distinct(what: str, values: Sequence[object]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(f"{what} {value!r} is given {count} times")


def _find_pairs(root: Path, split: FolderSplit) -> tuple[Pair, ...]:
    stars = re.compile("([^/]*)".join(map(re.escape, split.images.split("*"))))
    found = []
    for image in sorted(root.glob(split.images)):
        relative = image.relative_to(root).as_posix()
        match = stars.fullmatch(relative)
        if match and image.is_file():
            texts = iter(match.groups())
            label = re.sub(r"\*", lambda _: next(texts), split.labels)  # noqa: B023
            found.append((relative, image, root / label))
    stems = [Path(relative).stem for relative, _, _ in found]
    if len(set(stems)) < len(stems):
        stems = [str(Path(relative).with_suffix("")).replace("/", "_") for relative, _, _ in found]
    return tuple(Pair(s, image, label) for s, (_, image, label) in zip(stems, found, strict=True))

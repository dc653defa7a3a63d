"""What `predict` reads and where its results go: never onto or between its inputs."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.data.image_io import EXTENSIONS
from lgcnet_fast.errors import DataError
from lgcnet_fast.report.pictures import (
    RGB,
    Labels,
    colourise,
    label_picture,
    overlay,
    save_picture,
    side_by_side,
)

_CITYSCAPES_IMAGE = re.compile(r"(?P<frame>.+_\d{6}_\d{6})_leftImg8bit")


@dataclass(frozen=True)
class InputImage:
    """An image file and the name of its results: relative to the output folder, no extension."""

    path: Path
    name: str


def find_images(source: Path, out: Path) -> list[InputImage]:
    """The image `source`, or all images below the folder `source` with their subfolders kept.

    `out` may lie inside `source`: it is not searched. Raises `DataError` if there is no image, or
    if results would lie between the inputs.
    """
    refuse_between_inputs(source, out)
    if not source.is_dir():
        return [InputImage(source, source.stem)]
    paths = _images_below(source, out)
    if not paths:
        known = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{source}: no image in this folder; the extensions known are {known}")
    return _named(paths, source)


def refuse_between_inputs(source: Path, out: Path) -> None:
    """Raises `DataError` if `source` is missing, or if `out` is its folder or no folder."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise DataError(f"{out}: holds the input; choose another output folder")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another output folder")


def cityscapes_names(images: Sequence[InputImage]) -> list[InputImage]:
    """Names as the Cityscapes test server wants them, CITY_SEQ_FRAME_pred_labelIds, in one folder.

    Raises `DataError` for an image that is not named CITY_SEQ_FRAME_leftImg8bit, or twice there.
    """
    renamed = []
    for image in images:
        match = _CITYSCAPES_IMAGE.fullmatch(image.path.stem)
        if match is None:
            raise DataError(
                f"{image.path}: not named CITY_SEQ_FRAME_leftImg8bit.png, so the Cityscapes server "
                "could not assign its result; predict with --format pictures instead"
            )
        renamed.append(InputImage(image.path, f"{match['frame']}_pred_labelIds"))
    [(name, count)] = Counter(image.name for image in renamed).most_common(1)
    if count > 1:
        twice = [str(image.path) for image in renamed if image.name == name]
        raise DataError(f"{twice[0]} and {twice[1]}: same frame twice; remove one of them")
    return renamed


def save_pictures(out: Path, name: str, image: RGB, labels: Labels, classes: ClassSet) -> None:
    """NAME_labels.png (train ids with palette), NAME_overlay.png and NAME_side_by_side.png."""
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    save_labels(target.with_name(f"{target.name}_labels.png"), labels, classes)
    for kind, picture in (
        ("overlay", overlay(image, labels, classes)),
        ("side_by_side", side_by_side([image, colourise(labels, classes)])),
    ):
        save_picture(target.with_name(f"{target.name}_{kind}.png"), picture)


def save_labels(path: Path, labels: Labels, classes: ClassSet) -> None:
    """Palette PNG of the train ids."""
    save_picture(path, label_picture(labels, classes))


def save_label_ids(out: Path, name: str, labels: Labels, classes: ClassSet) -> None:
    """NAME.png, 8-bit grey, with the ids that the data set's own label files use."""
    ids = np.array(classes.output_ids, np.uint8)[labels]
    out.mkdir(parents=True, exist_ok=True)
    save_picture(out / f"{name}.png", Image.fromarray(ids))


def _images_below(folder: Path, out: Path) -> list[Path]:
    paths, results = [], out.resolve()
    for current, subfolders, files in os.walk(folder):
        inputs = [name for name in subfolders if Path(current, name).resolve() != results]
        subfolders[:] = sorted(inputs)
        paths += [Path(current, name) for name in sorted(files)]
    return [path for path in paths if path.suffix.lower() in EXTENSIONS]


def _named(paths: Sequence[Path], folder: Path) -> list[InputImage]:
    """Names without extension; with it where two images differ in nothing else."""
    bare = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    counts = Counter(bare)
    return [
        InputImage(path, name if counts[name] == 1 else path.relative_to(folder).as_posix())
        for path, name in zip(paths, bare, strict=True)
    ]

"""Pictures of label maps: colours, overlays, legends and contact sheets.

Images are uint8 arrays (height, width, 3) RGB, label maps uint8 arrays (height, width) of train
ids; ids without a class count as ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.files import replacing

RGB = NDArray[np.uint8]
Labels = NDArray[np.uint8]

_GAP = 4
_MARGIN = 8
_LINE = 20
_SWATCH = 14
_TEXT = 13


def colourise(labels: Labels, classes: ClassSet) -> RGB:
    """Every pixel in the colour of its class, ignored ones black."""
    return classes.palette()[labels]


def label_picture(labels: Labels, classes: ClassSet) -> Image.Image:
    """Palette image: its pixel values are the train ids, and viewers show the class colours."""
    picture = Image.fromarray(labels)
    picture.putpalette(classes.palette().tobytes())
    return picture


def overlay(image: RGB, labels: Labels, classes: ClassSet) -> RGB:
    """Image and class colours half and half; ignored pixels show the image alone."""
    mixed = (image.astype(np.uint16) + colourise(labels, classes)) // 2
    known = (labels < len(classes))[..., None]
    return np.where(known, mixed.astype(np.uint8), image)


def side_by_side(pictures: Sequence[RGB]) -> RGB:
    """Pictures of one size in a row, with white gaps."""
    height = pictures[0].shape[0]
    gap = np.full((height, _GAP, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(row[:-1], axis=1)


def legend(classes: ClassSet, width: int) -> RGB:
    """Swatches and names of all classes on white, in as many columns as fit in `width` pixels."""
    font = ImageFont.load_default(_TEXT)
    widest = max(font.getlength(name) for name in classes.names)
    column = int(widest) + _SWATCH + 3 * _MARGIN
    columns = max(1, min(len(classes), width // column))
    rows = -(-len(classes) // columns)
    canvas = Image.new("RGB", (max(width, column), rows * _LINE + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (name, colour) in enumerate(zip(classes.names, classes.colours, strict=True)):
        x = _MARGIN + (index // rows) * column
        y = _MARGIN + (index % rows) * _LINE
        swatch = (x, y, x + _SWATCH, y + _SWATCH)
        draw.rectangle(swatch, fill=tuple(int(value) for value in colour), outline="black")
        draw.text((x + _SWATCH + _MARGIN, y - 1), name, fill="black", font=font)
    return np.asarray(canvas)


def contact_sheet(
    samples: Iterable[tuple[str, RGB, Sequence[Labels]]],
    classes: ClassSet,
    headings: Sequence[str],
    width: int = 320,
) -> RGB:
    """One row a sample (name, image, label maps), every picture `width` pixels wide, between
    headings (one a picture) and the class legend. Raises `ValueError` without samples."""
    bands = [_text_line(headings, width)]
    for name, image, maps in samples:
        colours = [colourise(labels, classes) for labels in maps]
        # Colours are not interpolated: mixtures would be no class.
        scaled = [_to_width(image, width, Image.Resampling.BILINEAR)]
        scaled += [_to_width(picture, width, Image.Resampling.NEAREST) for picture in colours]
        bands.append(side_by_side(scaled))
        bands.append(_text_line((name,), bands[-1].shape[1]))
    if len(bands) == 1:
        raise ValueError("a contact sheet needs at least one sample")
    bands.append(legend(classes, bands[0].shape[1]))
    return _stack(bands)


def save_picture(path: Path, picture: RGB | Image.Image) -> None:
    """PNG, replacing the file as a whole."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def _to_width(picture: RGB, width: int, resample: Image.Resampling) -> RGB:
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return np.asarray(Image.fromarray(picture).resize((width, height), resample))


def _text_line(texts: Sequence[str], width: int) -> RGB:
    """A white line of text with one column of `width` pixels a text."""
    canvas = Image.new("RGB", (len(texts) * (width + _GAP) - _GAP, _LINE), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_TEXT)
    for column, text in enumerate(texts):
        draw.text((column * (width + _GAP) + 2, 2), text, fill="black", font=font)
    return np.asarray(canvas)


def _stack(bands: Sequence[RGB]) -> RGB:
    """Bands one below the other on white, left-aligned."""
    width = max(band.shape[1] for band in bands)
    padded = [
        np.pad(band, ((0, 0), (0, width - band.shape[1]), (0, 0)), constant_values=255)
        for band in bands
    ]
    return np.concatenate(padded)

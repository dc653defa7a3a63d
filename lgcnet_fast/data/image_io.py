"""Reading images and masks of any common kind, or saying which file cannot be read and why.

Everything outside the package's own synthetic data passes through here, so the formats are
limited to raster formats that Pillow decodes itself (no PostScript interpreter, no plug-ins).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lgcnet_fast.data.faults import FileFault

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"}
)
MAX_PIXELS = 1024**3 // 4 // 3
"""Larger images are refused, at the size from which Pillow suspects a decompression bomb."""

Decoded = TypeVar("Decoded")


def read_image(path: Path) -> NDArray[np.uint8]:
    """RGB uint8 (height, width, 3), upright by its EXIF orientation.

    Grey and palette images become RGB, 16-bit grey is scaled to 8 bits, alpha is dropped, CMYK is
    converted. Raises `DataError` naming the file.
    """
    return _decode(path, lambda image: _to_rgb(ImageOps.exif_transpose(image), path))


def read_mask(path: Path) -> NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int32]:
    """The ids of a mask as stored, (height, width): palette indices, 8, 16 or 32 bits.

    Raises `DataError` naming the file, also when the mask holds colours or was stored lossily.
    """
    return _decode(path, lambda image: _to_ids(image, path))


def read_colour_mask(path: Path) -> NDArray[np.uint8]:
    """The colours of a mask, RGB uint8 (height, width, 3). Raises `DataError` naming the file."""
    return _decode(path, lambda image: _to_colours(image, path))


def _decode(path: Path, convert: Callable[[Image.Image], Decoded]) -> Decoded:
    # Also false for names that the system refuses, and for pipes, which would block.
    if not os.path.isfile(path):
        raise FileFault(path, "no such file", "restore it or correct the list that names it")
    try:
        # Opening reads only the header; the size is judged before anything is decoded.
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image, path)
            image.load()
            return convert(image)
    except FileFault:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(path) from None
    except PermissionError:
        raise FileFault(path, "may not be read", "change its permissions") from None
    # Decoders raise nearly every exception there is on damaged bytes.
    except Exception as error:
        fault = f"not a readable image ({type(error).__name__})"
        remedy = f"save it again as one of {', '.join(FORMATS)}, or remove it"
        raise FileFault(path, fault, remedy) from None


def _check_size(image: Image.Image, path: Path) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise FileFault(path, f"empty image ({width}x{height})", "save it again or remove it")
    if width * height > MAX_PIXELS:
        raise _too_large(path)


def _too_large(path: Path) -> FileFault:
    return FileFault(path, f"more than {MAX_PIXELS} pixels", "cut it into tiles or reduce it")


def _to_rgb(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        grey = _narrow(np.asarray(image), path)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise FileFault(path, "floating-point pixels", "convert it to 8 bits a channel")
    if "transparency" in image.info or image.mode == "PA":
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _narrow(grey: NDArray[np.integer], path: Path) -> NDArray[np.uint8]:
    """16-bit grey to 8 bits; 65535 becomes 255."""
    if grey.min() < 0 or grey.max() > 65535:
        raise FileFault(path, "more than 16 bits a pixel", "convert it to 8 bits a channel")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_ids(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    _check_lossless(image, path)
    mode = image.mode
    if mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if mode == "I":
        return np.asarray(image).astype(np.int32)
    if mode in ("1", "L", "P"):
        return np.asarray(image).astype(np.uint8)
    if mode in ("LA", "PA"):
        return np.array(image.getchannel(0))
    if mode in ("RGB", "RGBA"):
        channels = np.asarray(image)[:, :, :3]
        if (channels == channels[:, :, :1]).all():
            return channels[:, :, 0].copy()
        fault = "holds colours where one class id a pixel is expected"
    else:
        fault = f"mode {mode} holds no class ids"
    raise FileFault(path, fault, "store ids in an 8-bit grey or palette PNG")


def _to_colours(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    _check_lossless(image, path)
    if image.mode not in ("RGB", "RGBA", "P", "L"):
        raise FileFault(path, f"mode {image.mode} holds no class colours", "store it as RGB PNG")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _check_lossless(image: Image.Image, path: Path) -> None:
    if image.format == "JPEG":
        raise FileFault(path, "JPEG changes the classes of a mask", "export the masks as PNG")

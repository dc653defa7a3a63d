"""Images as applications hold them, as the one form that engines take."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lgcnet_fast.errors import DataError


def pixels_of(image: NDArray[np.uint8] | Tensor | Image.Image) -> Tensor:
    """RGB uint8 (H, W, 3) on the image's device, sharing its memory where possible.

    Takes arrays (H, W, 3), tensors (H, W, 3) or (3, H, W) and PIL images in mode RGB. Raises
    `DataError` for anything else.
    """
    if isinstance(image, Image.Image):
        return _from_array(_decoded(image))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    raise DataError(
        f"an image must be a numpy array, a torch tensor or a PIL image, not a "
        f"{type(image).__name__}"
    )


def _decoded(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode != "RGB":
        raise DataError(f'PIL image of mode {image.mode!r}: use image.convert("RGB")')
    try:
        return np.asarray(image)
    # PIL decodes a file only now.
    except OSError as error:
        raise DataError(f"PIL image that cannot be decoded: {error}; save it again") from None


def _from_array(image: NDArray[np.uint8]) -> Tensor:
    _check_dtype(image.dtype, image.dtype == np.uint8)
    _check_shape(image.shape, "(height, width, 3)", image.ndim == 3 and image.shape[2] == 3)
    # torch takes neither negative strides nor, without a warning, read-only memory.
    return torch.from_numpy(np.require(image, requirements=["C", "W", "E"]))


def _from_tensor(image: Tensor) -> Tensor:
    _check_dtype(image.dtype, image.dtype == torch.uint8)
    channels = [axis for axis in (0, -1) if image.dim() == 3 and image.shape[axis] == 3]
    _check_shape(tuple(image.shape), "(height, width, 3) or (3, height, width)", bool(channels))
    if len(channels) == 2:
        raise DataError(
            f"tensor of shape {tuple(image.shape)}: either side could be the channels; give it as "
            "a numpy array (height, width, 3)"
        )
    return image if channels == [-1] else image.permute(1, 2, 0)


def _check_dtype(dtype: object, fits: bool) -> None:
    if not fits:
        raise DataError(f"image of dtype {dtype}: give uint8, RGB from 0 to 255")


def _check_shape(shape: tuple[int, ...], wanted: str, fits: bool) -> None:
    if not fits:
        raise DataError(f"image of shape {shape}: give one RGB image {wanted}")
    if 0 in shape:
        raise DataError(f"image of shape {shape}: it has no pixels")

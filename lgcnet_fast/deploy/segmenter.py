"""The interface for applications: images in, label maps out."""

from __future__ import annotations

from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lgcnet_fast.config import Size
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.deploy.blueprint import load_blueprint, run_blueprint, save_blueprint
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.deploy.images import pixels_of
from lgcnet_fast.doctor import check_device
from lgcnet_fast.errors import ConfigError, DataError, DeviceError


class Segmenter:
    """A trained network as a function of images; threads may share it.

    strict_size: refuse images of another size than the engine's instead of resizing them.
    """

    def __init__(self, engine: Engine, strict_size: bool = False) -> None:
        if strict_size and engine.blueprint.size is None:
            raise ConfigError(
                "strict_size: this engine takes every image at its own size, as its run says with "
                'evaluate.size = "image"; leave strict_size out'
            )
        self._engine = engine
        self._strict_size = strict_size

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "fp32",
        strict_size: bool = False,
        backend: str = "auto",
    ) -> Segmenter:
        """From the folder of a finetuned run, or from a file of `save`.

        device: auto, cpu, cuda or cuda:N; dtype: fp32, fp16 or bf16; backend: auto, triton, cuda
        or reference. Raises `RunError` or `EngineError` for what is wrong with the path,
        `DeviceError` with the device, `BackendError` where a named backend cannot serve.
        """
        path = Path(path)
        blueprint = run_blueprint(path) if path.is_dir() else load_blueprint(path)
        return cls(Engine(blueprint, check_device(device), dtype, backend), strict_size)

    def save(self, path: str | Path) -> None:
        """One file for `load` on any device, with float32 weights. Raises `EngineError`."""
        save_blueprint(self._engine.blueprint, Path(path))

    @property
    def classes(self) -> ClassSet:
        """Names and colours, in train-id order."""
        return self._engine.blueprint.classes

    @property
    def size(self) -> Size | None:
        """(height, width) of the network's input; None: the size of each image."""
        return self._engine.blueprint.size

    @overload
    def __call__(self, image: Tensor) -> Tensor: ...
    @overload
    def __call__(self, image: NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]: ...

    def __call__(
        self, image: Tensor | NDArray[np.uint8] | Image.Image
    ) -> Tensor | NDArray[np.uint8]:
        """Train ids uint8 (H, W) of an RGB uint8 image, at its own resolution.

        image: numpy (H, W, 3), torch (H, W, 3) or (3, H, W), or PIL in mode RGB. A tensor gives a
        tensor on its device, the others give numpy. Raises `DataError` for other images and
        `DeviceError` if the image does not fit in the device's memory.
        """
        pixels = pixels_of(image)
        if self._strict_size:
            self._check_size(pixels)
        labels = self._labels(pixels)
        return labels.to(image.device) if isinstance(image, Tensor) else labels.cpu().numpy()

    def _labels(self, pixels: Tensor) -> Tensor:
        try:
            return self._engine.labels(pixels)
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"image of {_text(pixels)} does not fit in the memory of {self._engine.device}; "
                "reduce it"
            ) from None

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[:2]) != self.size:
            height, width = self.size or (0, 0)
            raise DataError(
                f"image of {_text(pixels)}, this engine takes {height}x{width}: resize it, or load "
                "the engine without strict_size"
            )


def _text(pixels: Tensor) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]} pixels (height x width)"

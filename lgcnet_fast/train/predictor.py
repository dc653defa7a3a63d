"""The trained network of a run as a function of images, whatever its search space."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lgcnet_fast.config import Size
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy.argmax import argmax_labels
from lgcnet_fast.deploy.blueprint import Blueprint
from lgcnet_fast.deploy.engine import DTYPES, Engine
from lgcnet_fast.deploy.fold import fold, folds
from lgcnet_fast.deploy.frames import labels_of_frames
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.report.pictures import RGB, Labels
from lgcnet_fast.train.precision import Precision, placed
from lgcnet_fast.train.run import Run

Key = TypeVar("Key")


class UnfoldedEngine:
    """A derived network as it was trained, with its batch norms, in the precision of training.

    size: (height, width) of the network's input; None: that of each image.
    """

    def __init__(self, network: nn.Module, size: Size | None, precision: Precision) -> None:
        self.network = placed(network, precision.device).eval()
        self.size, self.precision = size, precision

    @classmethod
    def open(cls, run: Run) -> UnfoldedEngine:
        """Raises `RunError` if the run has no trained network."""
        precision = Precision(run.precision, run.device)
        return cls(run.trained_network(), run.config.evaluate.size, precision)

    def stream(self, frames: Iterable[RGB]) -> Iterator[Labels]:
        """As `Engine.stream`."""
        return labels_of_frames(self._labels, frames, self.precision.device)

    @torch.inference_mode()
    def _labels(self, image: Tensor) -> Tensor:
        height, width = image.shape[:2]
        with self.precision.autocast():
            logits = self.network(network_input(image[None], self.size))
        return argmax_labels(logits.float(), (height, width))[0]


@dataclass(frozen=True)
class Predictor:
    """A trained network with its classes."""

    engine: Engine | UnfoldedEngine
    classes: ClassSet

    @classmethod
    def open(cls, run: Run, dtype: str | None = None) -> Predictor:
        """dtype: fp32, fp16 or bf16, if not that of the run's precision.

        Networks of plug-in spaces stay unfolded. Raises `RunError` if the run has no trained
        network, `ConfigError` for another dtype, `DeviceError` where the device lacks it,
        `BackendError` where the backend of the process cannot serve.
        """
        dtype = dtype or run.precision
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
        network, size = run.trained_network(), run.config.evaluate.size
        if not folds(network):
            return cls(UnfoldedEngine(network, size, Precision(dtype, run.device)), run.classes)
        blueprint = Blueprint(run.genotype(), run.classes, size, fold(network))
        return cls(Engine(blueprint, run.device, dtype), run.classes)

    def labelled(
        self, images: Iterable[tuple[Key, RGB]]
    ) -> Iterator[tuple[Key, RGB, Labels | None]]:
        """Each image with train ids uint8 (H, W) for its RGB uint8 (H, W, 3), in their order.

        Labels are None where the image does not fit in the device's memory; the others are done.
        Up to two images are drawn ahead, so that on a GPU neighbouring ones overlap.
        """
        waiting: deque[tuple[Key, RGB]] = deque()
        remaining = iter(images)

        def frames() -> Iterator[RGB]:
            for pair in remaining:
                waiting.append(pair)
                yield pair[1]

        while True:
            try:
                for labels in self.engine.stream(frames()):
                    yield *waiting.popleft(), labels
                return
            except torch.OutOfMemoryError:
                pass
            # The stream broke at the last of these, and those in front of it were on their way.
            while waiting:
                key, image = waiting.popleft()
                yield key, image, self._labels_if_they_fit(image)

    def _labels_if_they_fit(self, image: RGB) -> Labels | None:
        try:
            return next(self.engine.stream([image]))
        except torch.OutOfMemoryError:
            return None

"""Prediction with the trained network of a run: on images, folders and videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from lgcnet_fast.config import Size
from lgcnet_fast.data.classes import CITYSCAPES, ClassSet
from lgcnet_fast.data.image_io import read_image
from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy.argmax import argmax_labels
from lgcnet_fast.errors import ConfigError, DataError
from lgcnet_fast.report.pictures import RGB, Labels, colourise, overlay, side_by_side
from lgcnet_fast.report.video import VIDEO_EXTENSIONS, VideoWriter, frame_rate, read_frames
from lgcnet_fast.train.precision import Precision, placed
from lgcnet_fast.train.predict_files import (
    InputImage,
    cityscapes_names,
    find_images,
    refuse_between_inputs,
    save_label_ids,
    save_labels,
    save_pictures,
)
from lgcnet_fast.train.run import Run

FORMATS = ("pictures", "cityscapes")
Progress = Callable[[int, int | None], None]
"""Called with the images or frames done and their total, None where unknown."""


class Predictor:
    """A trained network with its classes and input size."""

    def __init__(
        self, network: nn.Module, classes: ClassSet, size: Size | None, precision: Precision
    ) -> None:
        self.network = placed(network, precision.device).eval()
        self.classes, self.size, self.precision = classes, size, precision

    @classmethod
    def open(cls, run: Run) -> Predictor:
        """Raises `RunError` if the run has no trained network."""
        precision = Precision(run.precision, run.device)
        return cls(run.trained_network(), run.classes, run.config.evaluate.size, precision)

    @torch.inference_mode()
    def labels(self, image: RGB) -> Labels:
        """Train ids uint8 (H, W) for RGB uint8 (H, W, 3), at the image's own resolution."""
        height, width = image.shape[:2]
        pixels = torch.from_numpy(image)[None].to(self.precision.device)
        with self.precision.autocast():
            logits = self.network(network_input(pixels, self.size))
        return argmax_labels(logits.float(), (height, width))[0].cpu().numpy()


def predict(predictor: Predictor, source: Path, out: Path, form: str, progress: Progress) -> int:
    """Predicts an image, the images below a folder, or a video; returns how many were done.

    `pictures` writes labels, overlay and side by side for each; `cityscapes` the label ids for
    the Cityscapes test server. An image that cannot be read does not keep the others from being
    done; at the end `DataError` names all such images.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: must be one of {', '.join(FORMATS)}")
    if form == "cityscapes" and predictor.classes.name != CITYSCAPES.name:
        raise ConfigError(
            f"--format cityscapes needs the {len(CITYSCAPES)} Cityscapes classes, but this network "
            f"was trained on {predictor.classes.name!r}; use --format pictures"
        )
    if source.suffix.lower() in VIDEO_EXTENSIONS and not source.is_dir():
        if form == "cityscapes":
            raise ConfigError(f"{source}: --format cityscapes takes images, not a video")
        return _predict_video(predictor, source, out, progress)
    images = find_images(source, out)
    if form == "cityscapes":
        images = cityscapes_names(images)
    return _predict_images(predictor, images, out, form, progress)


def _predict_images(
    predictor: Predictor,
    images: Sequence[InputImage],
    out: Path,
    form: str,
    progress: Progress,
) -> int:
    faults = []
    for done, item in enumerate(images, start=1):
        try:
            image = read_image(item.path)
            labels = _labels(predictor, image, item.path)
        except DataError as error:
            faults.append(str(error))
            continue
        if form == "cityscapes":
            save_label_ids(out, item.name, labels, predictor.classes)
        else:
            save_pictures(out, item.name, image, labels, predictor.classes)
        progress(done, len(images))
    if faults and len(images) == 1:
        raise DataError(faults[0])
    if faults:
        head = f"{len(faults)} of {len(images)} images have no prediction"
        raise DataError("\n  ".join([head, *faults]))
    return len(images)


def _predict_video(predictor: Predictor, source: Path, out: Path, progress: Progress) -> int:
    """NAME_overlay.mp4, NAME_side_by_side.mp4 and NAME_labels/, one PNG a frame."""
    refuse_between_inputs(source, out)
    rate, classes, done = frame_rate(source), predictor.classes, 0
    labels_folder = out / f"{source.stem}_labels"
    labels_folder.mkdir(parents=True, exist_ok=True)
    with (
        VideoWriter(out / f"{source.stem}_overlay.mp4", rate) as overlays,
        VideoWriter(out / f"{source.stem}_side_by_side.mp4", rate) as pairs,
    ):
        for done, image in enumerate(read_frames(source), start=1):
            labels = _labels(predictor, image, source)
            overlays.write(overlay(image, labels, classes))
            pairs.write(side_by_side([image, colourise(labels, classes)]))
            save_labels(labels_folder / f"{done - 1:06}.png", labels, classes)
            progress(done, None)
    if done == 0:
        raise DataError(f"{source}: holds no frames; encode it anew")
    return done


def _labels(predictor: Predictor, image: RGB, path: Path) -> Labels:
    try:
        return predictor.labels(image)
    except torch.OutOfMemoryError:
        height, width = image.shape[:2]
        raise DataError(
            f"{path}: {height}x{width} pixels (height x width) do not fit in the device's memory; "
            "reduce the image, or train with evaluate.size set"
        ) from None

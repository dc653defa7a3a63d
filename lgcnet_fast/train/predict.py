"""Prediction with the trained network of a run: on images, folders and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lgcnet_fast.data.classes import CITYSCAPES
from lgcnet_fast.data.image_io import read_image
from lgcnet_fast.errors import ConfigError, DataError
from lgcnet_fast.report.pictures import RGB, colourise, overlay, side_by_side
from lgcnet_fast.report.video import VIDEO_EXTENSIONS, VideoWriter, frame_rate, read_frames
from lgcnet_fast.train.predict_files import (
    InputImage,
    cityscapes_names,
    find_images,
    refuse_between_inputs,
    save_label_ids,
    save_labels,
    save_pictures,
)
from lgcnet_fast.train.predictor import Predictor

FORMATS = ("pictures", "cityscapes")
Progress = Callable[[int, int | None], None]
"""Called with the images or frames done and their total, None where unknown."""


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
    faults: list[str] = []
    readable = _readable(images, faults)
    for (done, item), image, labels in predictor.labelled(readable):
        if labels is None:
            faults.append(str(_too_large(item.path, image)))
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


def _readable(
    images: Sequence[InputImage], faults: list[str]
) -> Iterator[tuple[tuple[int, InputImage], RGB]]:
    """The images that can be read, with their place among all; the others go to `faults`."""
    for place, item in enumerate(images, start=1):
        try:
            image = read_image(item.path)
        except DataError as error:
            faults.append(str(error))
            continue
        yield (place, item), image


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
        frames = enumerate(read_frames(source), start=1)
        for done, image, labels in predictor.labelled(frames):
            if labels is None:
                raise _too_large(source, image)
            overlays.write(overlay(image, labels, classes))
            pairs.write(side_by_side([image, colourise(labels, classes)]))
            save_labels(labels_folder / f"{done - 1:06}.png", labels, classes)
            progress(done, None)
    if done == 0:
        raise DataError(f"{source}: holds no frames; encode it anew")
    return done


def _too_large(path: Path, image: RGB) -> DataError:
    height, width = image.shape[:2]
    return DataError(
        f"{path}: {height}x{width} pixels (height x width) do not fit in the device's memory; "
        "reduce the image, or train with evaluate.size set"
    )

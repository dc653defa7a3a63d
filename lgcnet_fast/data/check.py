"""Looks at every file of a data set and reports all that is wrong with it at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.data.dataset import SegmentationDataset, check_sizes, open_dataset
from lgcnet_fast.data.faults import FileFault
from lgcnet_fast.data.parallel import ordered_map
from lgcnet_fast.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file, or with the data set, and how to mend it."""

    file: str
    fault: str
    remedy: str

    @classmethod
    def of(cls, error: DataError, split: str) -> Problem:
        if isinstance(error, FileFault):
            return cls(error.file, error.fault, error.remedy)
        return cls(f"split {split!r}", str(error), "correct the configuration")


@dataclass(frozen=True)
class SplitReport:
    """What one split holds."""

    split: str
    images: int
    pixels: NDArray[np.int64]
    """(classes,) pixels of each class."""
    ignored: int
    """Pixels without a class."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """(classes,) share of each class among all pixels, ignored ones included."""
        return self.pixels / max(1, self.pixels.sum() + self.ignored)

    @property
    def ignored_share(self) -> float:
        return self.ignored / max(1, int(self.pixels.sum()) + self.ignored)


@dataclass(frozen=True)
class CheckReport:
    """What `check_dataset` found."""

    classes: ClassSet | None
    """None where no split could be opened."""
    splits: tuple[SplitReport, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Examined:
    """What was seen of one pair."""

    problems: tuple[Problem, ...]
    digest: bytes | None
    """Of the decoded image; none where it could not be read."""
    histogram: NDArray[np.int64]
    """(256,) pixels of each train id, 0 where the label could not be read."""


def check_dataset(config: DataConfig) -> CheckReport:
    """Examines the training and validation splits, in threads.

    Finds missing and unreadable files, labels of another size than their image, ids or colours
    that no class has, and images that two splits share (the same pixels, under whatever name).
    """
    problems: list[Problem] = []
    splits: list[SplitReport] = []
    classes: ClassSet | None = None
    images = _SeenImages(config.train_splits)
    for split in dict.fromkeys((*config.train_splits, config.val_split)):
        try:
            dataset = open_dataset(config, split)
        except DataError as error:
            problems.append(Problem.of(error, split))
            continue
        classes = dataset.classes
        histogram = np.zeros(256, np.int64)
        all_examined = ordered_map(partial(_examine, dataset), len(dataset))
        for index, examined in enumerate(all_examined):
            histogram += examined.histogram
            problems += examined.problems
            if examined.digest is not None:
                problems += images.add(examined.digest, split, _where(dataset, index))
        ignored = int(histogram[len(classes) :].sum())
        splits.append(SplitReport(split, len(dataset), histogram[: len(classes)], ignored))
    return CheckReport(classes, tuple(splits), tuple(problems))


class _SeenImages:
    """Where each image was seen first."""

    def __init__(self, train_splits: tuple[str, ...]) -> None:
        self.train_splits = train_splits
        self.first: dict[bytes, tuple[str, str]] = {}

    def add(self, digest: bytes, split: str, file: str) -> list[Problem]:
        """A problem where another split has the image too.

        One file in two training splits is no mistake: Cityscapes labels it twice, fine and coarse.
        """
        other, other_file = self.first.setdefault(digest, (split, file))
        both_train = split in self.train_splits and other in self.train_splits
        if other == split or (both_train and file == other_file):
            return []
        fault = f"the same image in split {split!r} and, as {other_file}, in {other!r}"
        return [Problem(file, fault, "remove it from one of them")]


def _examine(dataset: SegmentationDataset, index: int) -> _Examined:
    problems: list[Problem] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except DataError as error:
            problems.append(Problem.of(error, dataset.split))
            return None

    image = attempt(lambda: dataset.image(index))
    label = attempt(lambda: dataset.label(index))
    if image is not None and label is not None:
        attempt(lambda: check_sizes(dataset, index, image, label))
    return _Examined(
        tuple(problems),
        None if image is None else _digest(image),
        np.zeros(256, np.int64) if label is None else np.bincount(label.ravel(), minlength=256),
    )


def _digest(image: NDArray[np.uint8]) -> bytes:
    digest = hashlib.blake2b(f"{image.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def _where(dataset: SegmentationDataset, index: int) -> str:
    return str(dataset.image_path(index) or dataset.stem(index))

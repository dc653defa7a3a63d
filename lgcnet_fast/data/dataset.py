"""What every segmentation data set offers, and the one that a configuration names."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lgcnet_fast.config import DataConfig
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.data.faults import FileFault
from lgcnet_fast.data.image_io import read_image
from lgcnet_fast.errors import DataError

Image = NDArray[np.uint8]


class SegmentationDataset(ABC):
    """Images with one class a pixel. Methods are called from several threads at once."""

    name: str
    split: str
    classes: ClassSet

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def stem(self, index: int) -> str:
        """Unique name of the image within the split, without folder and extension."""

    @abstractmethod
    def image(self, index: int) -> Image:
        """RGB uint8 (height, width, 3). Raises `DataError`."""

    @abstractmethod
    def label(self, index: int) -> Image:
        """Train ids uint8 (height, width), 255 where ignored. Raises `DataError`."""

    def image_path(self, index: int) -> Path | None:
        """The image's file, for data sets made of files."""
        return None

    def label_path(self, index: int) -> Path | None:
        """The label's file, for data sets made of files."""
        return None

    def identity(self) -> str:
        """Names the set; a cache of another state of the same set replaces its predecessor."""
        return f"{self.name} {self.split} {self.fingerprint()}"

    def fingerprint(self) -> str:
        """Changes whenever an image or label does; here by looking at three of them."""
        digest = hashlib.sha256(f"{self.classes} {len(self)}".encode())
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            for pixels in (self.image(index), self.label(index)):
                digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Pair:
    """An image file and its label file."""

    stem: str
    image: Path
    label: Path


class FileDataset(SegmentationDataset):
    """Pairs of files below `root`; `read_label` turns a label file into train ids."""

    def __init__(
        self,
        name: str,
        root: Path,
        split: str,
        classes: ClassSet,
        pairs: tuple[Pair, ...],
        read_label: Callable[[Path], Image],
    ) -> None:
        self.name = name
        self.root = root
        self.split = split
        self.classes = classes
        self.pairs = pairs
        self.read_label = read_label

    def __len__(self) -> int:
        return len(self.pairs)

    def stem(self, index: int) -> str:
        return self.pairs[index].stem

    def image(self, index: int) -> Image:
        return read_image(self.pairs[index].image)

    def label(self, index: int) -> Image:
        return self.read_label(self.pairs[index].label)

    def image_path(self, index: int) -> Path:
        return self.pairs[index].image

    def label_path(self, index: int) -> Path:
        return self.pairs[index].label

    def identity(self) -> str:
        return f"{self.name} {self.split} {self.root.resolve()}"

    def fingerprint(self) -> str:
        """From paths, sizes and modification times. Raises `DataError` (missing file)."""
        digest = hashlib.sha256(f"{self.classes} {self.read_label}".encode())
        for pair in self.pairs:
            digest.update(f"{pair.stem}{file_state(pair.image)}{file_state(pair.label)}".encode())
        return digest.hexdigest()


def open_dataset(config: DataConfig, split: str) -> SegmentationDataset:
    """The data set that the configuration names. Raises `DataError` (folder, list or split)."""
    # Imported here: each of these modules imports this one.
    from lgcnet_fast.data import camvid, cityscapes, folder

    if config.name == "synthetic":
        return _open_synthetic(config, split)
    openers = {
        "cityscapes": cityscapes.open_cityscapes,
        "camvid": camvid.open_camvid,
        "camvid_original": camvid.open_camvid_original,
        "folder": folder.open_folder,
    }
    root = config.root
    if root is None or not root.is_dir():
        raise FileFault(f"{root}", "no such folder", "set data.root to the data set's folder")
    return openers[config.name](root, split)


def _open_synthetic(config: DataConfig, split: str) -> SegmentationDataset:
    from lgcnet_fast.data.synthetic import SyntheticStreets

    counts = {"train": config.synthetic_images, "val": max(1, config.synthetic_images // 4)}
    if split not in counts:
        raise unknown_split("synthetic data", split, tuple(counts))
    return SyntheticStreets(split, counts[split], config.synthetic_size, config.synthetic_seed)


def unknown_split(source: Path | str, split: str, known: tuple[str, ...]) -> DataError:
    return FileFault(source, f"no split {split!r}", f"the splits are {', '.join(known)}")


def image_and_label(dataset: SegmentationDataset, index: int) -> tuple[Image, Image]:
    """Both, after checking that their sizes agree. Raises `DataError`."""
    image, label = dataset.image(index), dataset.label(index)
    check_sizes(dataset, index, image, label)
    return image, label


def check_sizes(dataset: SegmentationDataset, index: int, image: Image, label: Image) -> None:
    """Raises `DataError` where a label is not of its image's size."""
    if image.shape[:2] != label.shape:
        where = dataset.label_path(index) or dataset.stem(index)
        fault = f"label is {_size(label)} but its image is {_size(image)} (height x width)"
        raise FileFault(where, fault, "export the label at the image's size")


def _size(pixels: Image) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"


def file_state(path: Path) -> str:
    """Path, size and modification time of a file. Raises `DataError` (missing file)."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        remedy = "restore it or correct the list that names it"
        raise FileFault(path, "no such file", remedy) from None
    return f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0"

"""Images of one class each, in ImageNet's layout: SPLIT/CLASS/IMAGE."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path

from lgcnet_fast.config import PretrainConfig
from lgcnet_fast.data.dataset import Image, file_state, unknown_split
from lgcnet_fast.data.faults import FileFault
from lgcnet_fast.data.image_io import EXTENSIONS, read_image

SPLITS = ("train", "val")


class ClassificationDataset(ABC):
    """Images with one class each. Methods are called from several threads at once."""

    name: str
    split: str
    classes: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image:
        """RGB uint8 (height, width, 3). Raises `DataError`."""

    @abstractmethod
    def target(self, index: int) -> int:
        """Index into `classes`."""

    def identity(self) -> str:
        """Names the set; a cache of another state of the same set replaces its predecessor."""
        return f"{self.name} {self.split} {self.fingerprint()}"

    def fingerprint(self) -> str:
        """Changes whenever an image does; here by looking at three of them."""
        digest = hashlib.sha256(f"{self.classes} {len(self)}".encode())
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            image = self.image(index)
            digest.update(f"{image.shape}".encode() + image.tobytes())
        return digest.hexdigest()


class ClassFolder(ClassificationDataset):
    """A split of a class folder; classes are the subfolders of `train`, sorted."""

    name = "class_folder"

    def __init__(
        self, root: Path, split: str, classes: tuple[str, ...], files: list[tuple[Path, int]]
    ) -> None:
        self.root = root
        self.split = split
        self.classes = classes
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image:
        return read_image(self.files[index][0])

    def target(self, index: int) -> int:
        return self.files[index][1]

    def identity(self) -> str:
        return f"{self.name} {self.split} {self.root.resolve()}"

    def fingerprint(self) -> str:
        """From paths, sizes and modification times. Raises `DataError` (missing file)."""
        digest = hashlib.sha256()
        for path, target in self.files:
            digest.update(f"{target} {file_state(path)}".encode())
        return digest.hexdigest()


def open_classes(config: PretrainConfig, split: str, image_size: int) -> ClassificationDataset:
    """The class folder of `pretrain.data`, or synthetic classes of `image_size` pixels."""
    if config.data is not None:
        return open_class_folder(config.data, split)
    from lgcnet_fast.data.synthetic_classes import SyntheticClasses

    counts = {"train": config.synthetic_images, "val": max(1, config.synthetic_images // 4)}
    if split not in counts:
        raise unknown_split("synthetic classes", split, SPLITS)
    return SyntheticClasses(split, counts[split], image_size, seed=0)


def open_class_folder(root: Path, split: str) -> ClassFolder:
    """`split` is train or val. Raises `DataError` (folder, class only in val, no images)."""
    if split not in SPLITS:
        raise unknown_split(root, split, SPLITS)
    classes = _subfolders(root / "train")
    found = _subfolders(root / split)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        fault = f"class {unknown[0]!r} is not in {root / 'train'}"
        raise FileFault(root / split, fault, "add it to train or remove it")
    files = [
        (path, target)
        for target, name in enumerate(classes)
        if name in found
        for path in _images(root / split / name)
    ]
    if not files:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise FileFault(root / split, f"no CLASS/IMAGE with an ending of {kinds}", "add images")
    return ClassFolder(root, split, classes, files)


def _subfolders(folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        remedy = "pretrain.data must hold train/CLASS/IMAGE and val/CLASS/IMAGE"
        raise FileFault(folder, f"no such folder ({error.strerror})", remedy) from None
    if not names:
        raise FileFault(folder, "no class folder in it", "make one folder a class")
    return tuple(names)


def _images(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if os.path.splitext(e.name)[1].lower() in EXTENSIONS]
    return [folder / name for name in sorted(names) if not name.startswith(".")]

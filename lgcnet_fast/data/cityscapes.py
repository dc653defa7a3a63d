"""Cityscapes as downloaded: leftImg8bit with gtFine or gtCoarse below one root.

Splits: `train`, `val`, `test` with fine labels (those of `test` are empty); `train_coarse` and
`val_coarse`, the same images with coarse labels; `train_extra_coarse`, the 20,000 further images.
"""

from __future__ import annotations

from pathlib import Path

from lgcnet_fast.data.classes import CITYSCAPES, CITYSCAPES_LABEL_IDS
from lgcnet_fast.data.dataset import FileDataset, Pair, unknown_split
from lgcnet_fast.data.faults import FileFault
from lgcnet_fast.data.labels import IdLabels, ids_of

IMAGE_SUFFIX = "_leftImg8bit.png"

# Split -> (folder of the images, label package).
SPLITS = {
    "train": ("train", "gtFine"),
    "val": ("val", "gtFine"),
    "test": ("test", "gtFine"),
    "train_coarse": ("train", "gtCoarse"),
    "val_coarse": ("val", "gtCoarse"),
    "train_extra_coarse": ("train_extra", "gtCoarse"),
}


def open_cityscapes(root: Path, split: str) -> FileDataset:
    """Images of a split with their labels. Raises `DataError` where the download is incomplete."""
    if split not in SPLITS:
        raise unknown_split(root, split, tuple(SPLITS))
    folder, package = SPLITS[split]
    images = root / "leftImg8bit" / folder
    labels = root / package / folder
    for needed in (images, labels):
        if not needed.is_dir():
            remedy = f"unpack {needed.relative_to(root).parts[0]} into the root of Cityscapes"
            raise FileFault(needed, "no such folder", remedy)
    found = sorted(images.glob(f"*/*{IMAGE_SUFFIX}"))
    pairs = tuple(_pair(image, labels, package) for image in found)
    if not pairs:
        raise FileFault(images, f"no CITY/*{IMAGE_SUFFIX} in it", "unpack leftImg8bit again")
    train_ids = ids_of(CITYSCAPES.output_ids, ignored=CITYSCAPES_LABEL_IDS)
    return FileDataset("cityscapes", root, split, CITYSCAPES, pairs, IdLabels(train_ids))


def _pair(image: Path, labels: Path, package: str) -> Pair:
    stem = image.name.removesuffix(IMAGE_SUFFIX)
    return Pair(stem, image, labels / image.parent.name / f"{stem}_{package}_labelIds.png")

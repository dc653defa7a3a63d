"""CamVid, in SegNet's layout (480x360, 11 classes) and as published (960x720, 32 colours).

SegNet's: `train.txt`, `val.txt`, `test.txt` in the root, each line an image and its label.
Original: images in `701_StillsRaw_full` or `images`, labels `NAME_L.png` in `LabeledApproved_full`
or `labels`, and the same three list files, one image name a line.
"""

from __future__ import annotations

import os
from pathlib import Path

from lgcnet_fast.data.classes import CAMVID, CAMVID_SEGNET_VOID, camvid_colour_ids
from lgcnet_fast.data.dataset import FileDataset, Pair, unknown_split
from lgcnet_fast.data.faults import FileFault
from lgcnet_fast.data.labels import ColourLabels, IdLabels, ids_of
from lgcnet_fast.data.lists import check_unique, read_list

IMAGE_FOLDERS = ("701_StillsRaw_full", "images")
LABEL_FOLDERS = ("LabeledApproved_full", "labels")


def open_camvid(root: Path, split: str) -> FileDataset:
    """A split in SegNet's layout. Raises `DataError` (no such split, malformed list)."""
    list_file = _list_file(root, split)
    pairs = tuple(
        Pair(Path(image).stem, _locate(root, image), _locate(root, label))
        for image, label in read_list(list_file, columns=2)
    )
    check_unique(list_file, [pair.stem for pair in pairs])
    train_ids = ids_of(CAMVID.output_ids, ignored=(CAMVID_SEGNET_VOID,))
    return FileDataset("camvid", root, split, CAMVID, pairs, IdLabels(train_ids))


def open_camvid_original(root: Path, split: str) -> FileDataset:
    """A split in the original layout. Raises `DataError` (split, list or folder)."""
    images, labels = _folder(root, IMAGE_FOLDERS), _folder(root, LABEL_FOLDERS)
    list_file = _list_file(root, split)
    stems = [Path(row[0]).stem for row in read_list(list_file, columns=1)]
    check_unique(list_file, stems)
    pairs = tuple(Pair(s, images / f"{s}.png", labels / f"{s}_L.png") for s in stems)
    return FileDataset(
        "camvid_original", root, split, CAMVID, pairs, ColourLabels(camvid_colour_ids())
    )


def _list_file(root: Path, split: str) -> Path:
    known = tuple(sorted(path.stem for path in root.glob("*.txt")))
    if known and split not in known:
        raise unknown_split(root, split, known)
    return root / f"{split}.txt"


def _locate(root: Path, listed: str) -> Path:
    """A path relative to the root. SegNet's published lists say `/SegNet/CamVid/train/x.png`."""
    path = Path(listed)
    if path.is_absolute() and not os.path.isfile(path):
        path = Path(*path.parts[-2:])
    return root / path


def _folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    remedy = "unpack it there or correct data.root"
    raise FileFault(root, f"no folder {' or '.join(names)} in it", remedy)

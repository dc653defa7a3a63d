"""Small data sets on disk, and the real ones where they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `camvid` and `caltech101`."""
    default = Path(__file__).parents[3] / "shared" / "data"
    root = Path(os.environ.get("LGCNET_TEST_DATA", default))
    if not (root / "camvid").is_dir():
        pytest.skip("no real data: set LGCNET_TEST_DATA to a folder with camvid and caltech101")
    return root


@pytest.fixture
def save() -> Callable[..., Path]:
    """Writes an array as an image, making its folder."""

    def write(path: Path, pixels: np.ndarray, **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)
        return path

    return write


@pytest.fixture
def camvid_root(tmp_path: Path, save) -> Path:
    """SegNet's layout: 3 training and 2 validation images of 12x16, one of them 10x14."""
    rng = np.random.default_rng(0)
    root = tmp_path / "camvid"
    for split, count in (("train", 3), ("val", 2)):
        lines = []
        for index in range(count):
            size = (10, 14) if index == 1 else (12, 16)
            stem = f"{split}{index}"
            save(root / split / f"{stem}.png", rng.integers(0, 256, (*size, 3), np.uint8))
            save(root / f"{split}annot" / f"{stem}.png", rng.integers(0, 12, size, np.uint8))
            lines.append(f"{split}/{stem}.png {split}annot/{stem}.png\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root

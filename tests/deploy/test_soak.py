"""A server's day: 100,000 frames of changing content and size from two threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lgcnet_fast.deploy import Segmenter
from tests.deploy.test_segmenter import picture

FRAMES = 100_000
WARM_UP = 10_000
THREADS = 2
IMAGES = [picture((24 + 5 * (i % 7), 40 + 9 * (i % 5)), seed=i) for i in range(60)]


def memory_mb() -> float:
    """Resident memory of this process and memory that torch has reserved on the GPU."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    reserved = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
    return (pages * os.sysconf("SC_PAGE_SIZE") + reserved) / 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "backend",
    ["auto", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))],
)
def test_memory_stays_and_no_label_map_is_wrong(run_folder: Path, backend: str) -> None:
    segmenter = Segmenter.load(run_folder, backend=backend)
    expected = [segmenter(image) for image in IMAGES]

    def wrong_frames(first: int, frames: int) -> int:
        wrong = 0
        for frame in range(first, first + frames):
            at = frame * 7 % len(IMAGES)
            wrong += not np.array_equal(segmenter(IMAGES[at]), expected[at])
        return wrong

    def serve(frames: int) -> int:
        share = frames // THREADS
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(pool.map(wrong_frames, range(THREADS), [share] * THREADS))

    assert serve(WARM_UP) == 0
    before = memory_mb()
    assert serve(FRAMES - WARM_UP) == 0
    assert memory_mb() - before < 16

"""A finished run, and its network as a segmenter."""

from __future__ import annotations

from pathlib import Path

import pytest

from lgcnet_fast.deploy import Segmenter
from tests.deploy.run_folders import make_run_folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("runs") / "camvid" / "seed-0")


@pytest.fixture(scope="session")
def segmenter(run_folder: Path) -> Segmenter:
    return Segmenter.load(run_folder, device="cpu")

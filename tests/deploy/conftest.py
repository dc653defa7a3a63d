"""A finished run, and its network as a segmenter; fused kernels interpreted where no GPU is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from lgcnet_fast.deploy import Segmenter  # noqa: E402
from tests.deploy.run_folders import make_run_folder  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, as the interpreter takes milliseconds for each."""
    from lgcnet_fast.kernels.infer_tile import INTERPRETED
    from lgcnet_fast.kernels.infer_tile_config import TileConfig

    if INTERPRETED:
        config = TileConfig(rows=16, columns=16, block_k=128, warps=4)
        monkeypatch.setattr(TileConfig, "default", lambda *arguments: config)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("runs") / "camvid" / "seed-0")


@pytest.fixture(scope="session")
def segmenter(run_folder: Path) -> Segmenter:
    return Segmenter.load(run_folder, device="cpu")

"""The measurement of the deploy engine runs from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import deploy, deploy_server
from bench.deploy_server import DeployServer
from bench.genotypes import RANDOM
from bench.training.command import TINY_SIZE, TINY_SPACE

ARGUMENTS = {"genotype": RANDOM[0], "space": TINY_SPACE, "ours": "reference"}


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    options = ["--dry", "--ours", "reference", "--stock", "eager-nhwc", "graph-nchw", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--out", str(out)])
    deploy.main()
    labels, eager, graph = json.loads(out.read_text())["rows"]
    assert labels["right"] and labels["differs_where_certain"] == 0
    assert eager["fps"] > 0 and eager["ours_fps"] > 0 and eager["speed_up"] > 0
    assert "CUDA graphs need a GPU" in graph["failed"]


def test_labels_that_cannot_be_compared_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--dry", "--ours", "cuda", "--out", str(out)])
    if torch.cuda.is_available():
        pytest.skip("the backend is there")
    with pytest.raises(SystemExit, match="cuda random-0 .*: BackendError: .*NVIDIA GPU"):
        deploy.main()
    assert not out.exists()


def test_wrong_labels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"size": TINY_SIZE, "dtype": "bf16"}
    server = DeployServer()
    assert server.check(case, **ARGUMENTS)["right"]

    def shifted(*arguments):
        frame = original(*arguments)
        return lambda: frame().roll(4, -1)

    original = deploy_server._engine
    monkeypatch.setattr("bench.deploy_server._engine", shifted)
    assert not server.check(case, **ARGUMENTS)["right"]
    assert not server.check({**case, "dtype": "fp32"}, **ARGUMENTS)["right"]

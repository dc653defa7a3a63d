"""Losses of a search beside the reference's: dry runs, and what counts as right."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import trajectory
from bench.trajectory import DRY, Course, judge
from bench.trajectory_server import TrajectoryServer

COURSE = Course({}, 2, (33, 33), images=4, early=2, late=(2, 4), at_once=1)
REFERENCES = {0: [3.0, 2.9, 2.0, 2.0], 1: [3.0, 2.9, 1.0, 1.0], 2: [3.0, 2.9, 1.4, 1.6]}


def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["x", "--dry", "--seeds", "0", "1", "--out", str(out)])
    trajectory.main()
    return json.loads(out.read_text())["rows"]


class Here:
    """A worker in this process, where torch is imported; only one at a time has its generator."""

    def __init__(self, target: str, environment: Mapping[str, str]) -> None:
        assert target == trajectory.TARGET
        self._server = TrajectoryServer()

    def ask(self, call: str, within: float, **arguments: Any) -> Any:
        return getattr(self._server, call)(**arguments)

    def end(self) -> None:
        pass


def test_the_reference_goes_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "Worker", Here)
    monkeypatch.setattr(trajectory, "ThreadPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(trajectory, "OURS", ("reference",))
    rows = dry_run(tmp_path, monkeypatch)
    losses = {(row["subject"], row["seed"]): row["losses"] for row in rows if "losses" in row}
    assert {len(found) for found in losses.values()} == {DRY.late[1]}
    assert losses["reference", 0] != losses["reference", 1]
    assert any(losses[trajectory.NUDGED, n] != losses["reference", n] for n in (0, 1))
    again, nudged = rows[-2:]
    assert again["right"] and again["early_difference"] == 0
    assert again["late_means"] == again["reference_late_means"]
    assert nudged["subject"] == trajectory.NUDGED and 0 < nudged["early_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for the CPU")
def test_interpreted_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = dry_run(tmp_path, monkeypatch)[-2:]
    assert ours["subject"] == "triton" and ours["right"]
    assert ours["early_difference"] < 1e-4


@pytest.mark.parametrize(
    ("ours", "right"),
    [
        ([3.05, 2.9, 1.5, 1.5], True),
        ([3.0, 2.9, 2.4, 2.0], True),
        ([3.07, 2.9, 1.5, 1.5], False),
        ([3.0, 2.9, 3.2, 3.1], False),
        ([3.0, 2.9, float("nan"), 1.0], False),
        ([float("nan"), 2.9, 1.5, 1.5], False),
    ],
)
def test_verdict(ours: list[float], right: bool) -> None:
    others = {seed: REFERENCES[seed] for seed in (0, 1)}
    assert judge({**others, 2: ours}, REFERENCES, COURSE)["right"] is right

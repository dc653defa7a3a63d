"""Plots of accuracy against speed and of predicted against measured latency."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lgcnet_fast.latency.check import CheckedNetwork, LatencyCheck
from lgcnet_fast.latency.table import Provenance
from lgcnet_fast.report.accuracy_fps import MeasuredPoint, draw_accuracy_fps
from lgcnet_fast.report.latency_check import draw_latency_check
from lgcnet_fast.report.published import published_rows


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.width > 400 and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 5


def test_accuracy_against_speed(tmp_path: Path) -> None:
    points = [MeasuredPoint("ours", 2000.0, 61.0), MeasuredPoint("unknown", 900.0, None)]
    draw_accuracy_fps(points, "Some GPU", tmp_path / "plot.png")
    assert is_picture(tmp_path / "plot.png")


def test_published_rows_are_complete_and_claim_no_device_that_is_not_recorded() -> None:
    rows = published_rows()
    assert len(rows) == 29
    assert all(40 < row.miou < 90 and 0 < row.fps < 1000 for row in rows)
    ours = [row for row in rows if row.method == "LGCNet"]
    assert [(row.miou, row.fps) for row in ours] == [(72.4, 115.2), (74.0, 115.2), (74.0, 205.6)]
    assert {row.device for row in ours} == {"NVIDIA TITAN Xp"}
    assert {row.device for row in rows if row not in ours} == {"not recorded"}


def test_predicted_against_measured(tmp_path: Path) -> None:
    made = Provenance(provider="fitted", device="Some GPU", runtime="deploy")
    networks = tuple(CheckedNetwork(str(n), 1.0 + n, 0.5, 1.1 + n) for n in range(5))
    check = LatencyCheck(made, made, {"uniform": networks, "varied light share": networks})
    draw_latency_check(check, tmp_path / "check.png")
    assert is_picture(tmp_path / "check.png")

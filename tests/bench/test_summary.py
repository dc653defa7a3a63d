"""Headline numbers and the plot, from rows as the measurements write them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import plot_steps, summarise
from bench.deploy import Subject
from bench.training.case import TrainingCase
from lgcnet_fast.benchmark.case import Case

ORIGIN = {"device": "A GPU", "commit": "abc", "command": "python -m bench.something"}


def step(subject: str, stage: str = "search", **changed: Any) -> dict[str, Any]:
    finetune = {"size": (360, 480), "genotype": "reference"} if stage == "finetune" else {}
    space = {"widths": [32, 64, 128]} if stage == "search" else {}
    columns = {name: changed.pop(name) for name in ("size", "batch") if name in changed}
    values = {"batch": 16, "size": (256, 512), "precision": "bf16", "space": space}
    case = TrainingCase(**{**values, **finetune, **columns})
    return {"stage": stage, "case": str(case), "subject": subject, **asdict(case), **changed}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({**ORIGIN, "rows": rows}))
    return path


def summary_of(*files: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    out = files[0].parent / "summary.json"
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, files), "--summary", str(out)])
    summarise.main()
    found = json.loads(out.read_text())
    assert all(entry["device"] == "A GPU" and entry["commit"] == "abc" for entry in found.values())
    return {name: entry["value"] for name, entry in found.items()}


STEPS = [
    step("ours-triton gradients", errors={}, faults=[]),
    step("ours-triton", beside="eager-nchw", ms=11.0, peak_gib=2.0),
    step("eager-nchw", ms=300.0, ours_ms=11.0, peak_gib=17.0),
    step("ours-triton", beside="graph-nhwc", ms=9.0, peak_gib=2.0),
    step("graph-nhwc", ms=160.0, ours_ms=9.0, peak_gib=8.0),
    step("eager-nhwc", failed="no answer"),
    step("ours-triton cold", first_full_speed_s=20.0),
    step("ours-triton", size=(769, 769), ms=50.0, peak_gib=9.0),
    step("ours-triton", stage="finetune", beside="graph-nhwc", ms=5.0, peak_gib=1.0),
    step("graph-nhwc", stage="finetune", ms=25.0, ours_ms=5.0, peak_gib=3.0),
    step("graph-nhwc", batch=4, ms=1.0, ours_ms=1.0, peak_gib=1.0),
]


def test_headlines_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = summary_of(write(tmp_path / "steps.json", STEPS), monkeypatch=monkeypatch)
    assert found == {
        "search_step_ms": 11.0,
        "search_step_best_stock_ms": 160.0,
        "search_step_peak_gib": 2.0,
        "search_step_eager_peak_gib": 17.0,
        "search_step_769_ms": 50.0,
        "search_step_769_peak_gib": 9.0,
        "search_first_step_cold_s": 20.0,
        "finetune_step_ms": 5.0,
        "finetune_step_best_stock_ms": 25.0,
    }


def test_headlines_of_kernels_and_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(operation: str, floor_us: float, ratio: float) -> dict[str, Any]:
        moved = int(floor_us * 4.25e6)
        return {"operation": operation, "floor_us": floor_us, "bytes": moved, "floor_ratio": ratio}

    rows = [
        kernel("depthwise forward", 8, 1.5),
        kernel("depthwise forward", 3, 9.0),
        kernel("depthwise backward", 8, 2.5),
        kernel("mixed sum alone", 100, 1.2),
        kernel("mixed sum backward", 90, 1.4),
        kernel("mixed sum backward", 2, 3.0),
        {"operation": "mixed_sum_forward", "key": "k", "configs": []},
        kernel("concatenation forward", 50, 1.3),
        kernel("sum of resized forward", 50, 2.0),
    ]

    def frame(subject: str, dtype: str, fps: float, ours_fps: float) -> dict[str, Any]:
        about = Subject("reference", {}, Case((769, 1537), 1, dtype)).columns
        numbers = {"fps": fps, "ours_fps": ours_fps, "ours_host_us": 20.0}
        return {**about, "subject": subject, "ours": "triton", **numbers}

    frames = [
        frame("graph-nhwc", "fp16", 400.0, 2000.0),
        frame("autotuned-nhwc", "fp16", 500.0, 2100.0),
        frame("graph-nhwc", "fp32", 300.0, 900.0),
    ]
    files = write(tmp_path / "k.json", rows), write(tmp_path / "d.json", frames)
    assert summary_of(*files, monkeypatch=monkeypatch) == {
        "depthwise_forward_floor_ratio_worst": 1.5,
        "depthwise_backward_floor_ratio_worst": 2.5,
        "mixed_sum_floor_ratio_worst": 1.4,
        "concat_upsample_floor_ratio_worst": 1.3,
        "deploy_fp16_fps": 2100.0,
        "deploy_fp16_best_stock_fps": 500.0,
        "deploy_host_us": 20.0,
        "deploy_fp32_fps": 900.0,
        "deploy_fp32_best_stock_fps": 300.0,
    }


def test_headlines_of_latency_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(**numbers: float) -> dict[str, float]:
        return {"networks": 50, "median_error_pct": 3.0, "worst_error_pct": 9.0, **numbers}

    made_on = {"device": "A GPU"}
    check = {
        "measured_on": made_on,
        "commit": "abc",
        "summary": {
            "uniform": group(median_error_pct=2.0),
            "varied light share": group(worst_error_pct=30.0, rank_correlation=0.98),
            "given": group(worst_error_pct=11.0),
        },
    }
    table = {"made_on": made_on, "commit": "abc", "fit": {"seconds": 61.5}, "entries": []}
    files = tmp_path / "check.json", tmp_path / "table.json"
    for path, content in zip(files, (check, table), strict=True):
        path.write_text(json.dumps(content))
    assert summary_of(*files, monkeypatch=monkeypatch) == {
        "lut_median_error_pct": 2.0,
        "lut_worst_error_pct": 11.0,
        "lut_rank_correlation": 0.98,
        "lut_build_s": 61.5,
    }


def test_a_file_without_headlines_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no headline number"):
        summary_of(write(tmp_path / "empty.json", []), monkeypatch=monkeypatch)


def test_plot_has_a_line_for_every_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "steps.json", STEPS)
    monkeypatch.setattr(sys, "argv", ["bench", str(file), "--out", str(tmp_path / "steps.png")])
    plot_steps.main()
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    rows = [row for row in json.loads(file.read_text())["rows"] if "ms" in row]
    times = plot_steps.points(rows, "ms", lambda row: row["batch"], plot_steps.size_of)
    assert times["ours-triton, 256x512"] == [(16, 9.0)]
    assert sorted(times["graph-nhwc, 256x512"]) == [(4, 1.0), (16, 160.0)]

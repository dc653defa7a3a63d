"""The speed guard: what counts as a regression, and how it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.guard.clock import RecordedClock
from bench.guard.verdict import Verdict, baseline_path, committed_ratios, fault, table

ROOT = Path(__file__).parents[2]
STOCK = {"slow": [9.0, 9.0, 9.0], "fast": [2.0, 4.0, 2.0]}


def test_verdict_compares_with_the_best_alternative_within_rounds() -> None:
    verdict = Verdict.of("case", [1.0, 2.0, 1.5], STOCK, floor_s=0.75)
    assert verdict.stock == "fast" and verdict.ratio == 0.5
    assert verdict.ratio_p10 == pytest.approx(0.5)
    assert verdict.floor_share == 0.5


def test_only_a_worse_ratio_is_a_fault() -> None:
    verdict = Verdict.of("case", [1.0, 2.0, 1.0], STOCK)
    assert fault(verdict, {}) is None
    assert fault(verdict, {"case": 0.45}) is None
    assert "0.500 of the time of fast at best, 0.400 when" in str(fault(verdict, {"case": 0.4}))


def test_one_slow_round_is_no_fault() -> None:
    """A machine that others use slows some rounds down, ours or theirs."""
    ours = [1.0] * 8 + [50.0] * 7
    verdict = Verdict.of("case", ours, {"stock": [2.0] * 15})
    assert fault(verdict, {"case": 0.5}) is None


def test_table_names_every_case() -> None:
    verdicts = [Verdict.of(name, [1e-5], {"stock": [2e-5]}, 5e-6) for name in ("one", "another")]
    title, one, another = table(verdicts, {"one": 0.49})
    assert "of floor" in title
    assert one.split() == ["one", "10.0", "us", "20.0", "us", "0.50", "0.49", "50%", "stock"]
    assert another.split() == ["another", "10.0", "us", "20.0", "us", "0.50", "50%", "stock"]


def test_recorded_clock_tells_each_duration_once() -> None:
    clock = RecordedClock()
    clock.load([3.0, 4.0])
    readings = [clock() for _ in range(4)]
    assert [end - begin for begin, end in zip(readings[::2], readings[1::2], strict=True)] == [3, 4]


def test_a_regression_fails_the_run(tmp_path: Path) -> None:
    first = run_guard("--record", str(tmp_path / "record.json"))
    assert first.returncode == 0, first.stdout
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert rows and all(row["ratio"] > 0 for row in rows)

    committed = {row["name"]: {**row, "ratio_p10": 1e-3 * row["ratio_p10"]} for row in rows}
    folder = tmp_path / "results"
    path = baseline_path(json.loads((tmp_path / "record.json").read_text())["device"], folder)
    folder.mkdir()
    path.write_text(json.dumps({"rows": list(committed.values())}))
    assert committed_ratios(path).keys() == committed.keys()
    second = run_guard("--baseline", str(folder))
    assert second.returncode == 1 and "when it was committed" in second.stdout


def run_guard(*options: str) -> subprocess.CompletedProcess[str]:
    chosen = ["bench/guard/test_operations.py", "-k", "max_pool and float32"]
    command = [sys.executable, "-m", "pytest", *chosen, "--benchmark-quiet", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

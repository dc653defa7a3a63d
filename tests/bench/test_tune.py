"""The tuning table that is made of measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.kernels.operation_cases import OperationCase, cases
from lgcnet_fast.ops.backend import current_backend
from lgcnet_fast.ops.tuning import read_table

ORIGIN = {
    "device": "A GPU",
    "torch": "2",
    "cuda": None,
    "python": "3",
    "commit": "c",
    "command": "d",
}


def swept(key: str, *microseconds: float, default: float | None = 10.0) -> dict:
    configs = [{"config": {"rows": n}, "us": us} for n, us in enumerate(microseconds, 1)]
    return {"operation": "pool", "key": key, "default_us": default, "configs": configs}


def test_only_better_tiles_are_taken(tmp_path: Path) -> None:
    tuning = tune.Tuning(ORIGIN, [tmp_path / "a", tmp_path / "b"])
    tuning.take(swept("better", 5.0, 10.0))
    tuning.take(swept("same", 9.9, 10.0))
    tuning.take(swept("default fails", 20.0, default=None))
    tuning.take(swept("nothing runs", default=None))
    tuning.backends["pool"] = "triton"
    tuning.write()
    for folder in ("a", "b"):
        table = read_table(tmp_path / folder / "a_gpu.json")
        assert table.configs == {"pool": {"better": {"rows": 1}, "default fails": {"rows": 1}}}

    later = tune.Tuning(ORIGIN, [tmp_path / "a"])
    later.take(swept("better", 10.0, 11.0))
    later.take(swept("other", 5.0, 10.0))
    later.write()
    table = read_table(tmp_path / "a" / "a_gpu.json")
    assert table.configs["pool"].keys() == {"default fails", "other"}
    assert table.backends == {"pool": "triton"}


def test_what_takes_longest_is_swept_first() -> None:
    small, large = (("max_pool_forward", f"float32 1x8x{n}x{n} 1") for n in (4, 4096))
    for counts, first in (({small: 9, large: 1}, large), ({small: 999, large: 1}, small)):
        sweeps = tune.sweeps_by_cost(counts)
        assert [(sweep.operation, sweep.key) for sweep in sweeps][0] == first


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.knobs", reason="Triton 3.3 cannot leave kernels out")
    if torch.cuda.is_available():
        pytest.skip("a dry run is for the CPU")

    def two_operations(size, dtype) -> list[OperationCase]:
        names = ("upsample_argmax", "mixed_norm_sum")
        return [case for case in cases(size, dtype) if case.operation in names]

    monkeypatch.setattr(tune, "cases", two_operations)
    monkeypatch.setattr(tune, "choose_engine", lambda size, tuning, rows: None)
    options = ["--dry", "--step", "finetune", "--families", "concat_upsample"]
    options += ["--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--out", str(tmp_path / "rows.json")])
    tune.main()
    swept = [r for r in json.loads((tmp_path / "rows.json").read_text())["rows"] if "configs" in r]
    assert {"concat_upsample", "concat_upsample_backward"} < {row["operation"] for row in swept}
    assert all(row["default_us"] == row["configs"][0]["us"] for row in swept)
    table = read_table(tmp_path / "cpu.json")
    names = {"upsample_argmax", "mixed_norm_sum"}
    assert table.backends == dict.fromkeys(names, "reference")


def test_a_wrong_backend_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (c for c in cases(None, torch.float32) if c.operation == "max_pool")

    def check(case: OperationCase, inputs: list[torch.Tensor]) -> None:
        if current_backend().name == "triton":
            raise SystemExit("WRONG RESULT")
        original(case, inputs)

    original = tune.check
    monkeypatch.setattr(tune, "check", check)
    assert tune._seconds_by_backend(case).keys() == {"cuda", "reference"} - _missing()


def _missing() -> set[str]:
    return set() if torch.cuda.is_available() else {"cuda"}

"""The measurement of training steps: worker processes, the gate, and dry runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import finetune_step, search_step
from bench.process import ROOT, WorkerFailed, Workers
from bench.training import search
from bench.training.case import TrainingCase
from bench.training.command import TINY_SIZE, TINY_SPACE
from bench.training.gradients import Gradients, judge

CASE = {"batch": 2, "size": TINY_SIZE, "precision": "fp32", "space": TINY_SPACE}


def dry_run(module, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict]:
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench", "--dry", "--precision", "fp32", "--rounds", "2", "--steps", "1", *options]
        + ["--out", str(out)],
    )
    module.main()
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize(
    "module", [search_step, pytest.param(finetune_step, marks=pytest.mark.slow)]
)
def test_dry_run(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    options = ("--ours", "ours-reference", "--stock", "eager-nchw")
    rows = dry_run(module, out, monkeypatch, *options)
    gate, ours, stock = rows
    assert gate["faults"] == [] and 0 < gate["errors"]["weights"] < 1e-2
    assert ours["beside"] == stock["subject"] == "eager-nchw"
    assert stock["speed_up"] == pytest.approx(stock["ms"] / stock["ours_ms"])


@pytest.mark.slow
def test_compiled_subjects_may_be_compiled_in_several_processes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    options = ("--ours", "ours-reference", "--stock", "compiled-nchw", "--compile-jobs", "2")
    *_, stock = dry_run(finetune_step, out, monkeypatch, *options)
    assert stock["subject"] == "compiled-nchw" and stock["ms"] > 0
    assert "not compiled" not in capsys.readouterr().out


def test_a_worker_that_takes_too_long_is_ended() -> None:
    with Workers("tests.bench.echo:Echo") as process:
        first = process.started
        with pytest.raises(WorkerFailed, match="no answer in 1 s"):
            process.ask("sleep", 1, seconds=600)
        assert process.ask("repeat", 100, text="a new one") == "a new one"
        assert process.started > first


def test_a_failing_call_is_told_and_survived() -> None:
    with Workers("tests.bench.echo:Echo") as process:
        with pytest.raises(WorkerFailed, match="ValueError: no such thing"):
            process.ask("fail", 100, reason="no such thing")
        assert process.ask("repeat", 100, text="still here") == "still here"
        with pytest.raises(WorkerFailed, match="exit code 3"):
            process.ask("leave", 100, code=3)


def test_a_worker_that_nobody_listens_to_ends_quietly() -> None:
    command = [sys.executable, "-m", "bench.worker", "tests.bench.echo:Echo"]
    request = {"call": "repeat", "arguments": {"text": "anyone?"}}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.close()
        assert "Error" not in process.stderr.read()
    assert process.returncode == 0


def test_stock_and_ours_train_alike() -> None:
    """Same weights, noise, data and optimisers: the losses of the first steps agree."""
    losses = {}
    for subject in ("ours-reference", "eager-nhwc"):
        step = search.make_step(subject, TrainingCase(**CASE))
        losses[subject] = [float(step()) for _ in range(3)]
    ours, stock = losses.values()
    assert ours == pytest.approx(stock, rel=2e-3)
    assert len(set(ours)) == 3


def test_gate_finds_a_wrong_gradient() -> None:
    parameter = torch.nn.Parameter(torch.randn(1000))
    loss = parameter.square().sum()
    loss.backward()
    truth = Gradients.of(loss, weights=[parameter])
    parameter.grad *= 1 + 1e-3
    off = Gradients.of(loss, weights=[parameter]).errors(truth)
    assert off["weights"] == pytest.approx(1e-3, rel=1e-3) and off["loss"] == 0
    exact = dict.fromkeys(off, 0.0)
    assert judge(exact, exact, "fp32") == []
    assert [fault.split(":")[0] for fault in judge(off, exact, "fp32")] == ["weights"]
    assert judge(off, dict.fromkeys(off, 0.9e-3), "fp32") == []
    assert judge({"weights": float("nan")}, {"weights": 1.0}, "fp32")


@pytest.mark.parametrize(
    ("precision", "right"), [("fp32", 1e-4), ("fp16", 2**-11), ("bf16", 2**-8)]
)
def test_the_loss_may_be_off_by_a_rounding(precision: str, right: float) -> None:
    assert judge({"loss": 0.99 * right}, {"loss": 0.0}, precision) == []
    assert judge({"loss": 1.01 * right}, {"loss": 0.0}, precision)

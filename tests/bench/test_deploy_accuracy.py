"""The accuracy of engines is measured from end to end, and what breaks a bar is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import deploy_accuracy
from bench.deploy_accuracy import broken_bar
from lgcnet_fast.config import validate_config
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.space.genotype import save_genotype
from lgcnet_fast.train.evaluate import evaluate
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.weights import save_weights
from tests.deploy.networks import SMALL, with_statistics

BATCH_LABELS = Engine.batch_labels


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run without training; three images in batches of two, resized by the engine."""
    folder = tmp_path_factory.mktemp("runs")
    data = {"name": "synthetic", "synthetic_images": 12, "synthetic_size": [48, 96]}
    values = {
        "device": "cpu",
        "space": SMALL | {"name": "lgcnet"},
        "data": data | {"cache_dir": str(folder / "cache")},
        "evaluate": {"size": [33, 65], "batch_size": 2},
    }
    run = Run(folder / "trained", validate_config(values, "test"), 0)
    genotype = run.space.random_genotype(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = with_statistics(run.space.build(genotype, run.num_classes))
    save_genotype(genotype, run.genotype_path)
    save_weights(network, run.weights_path("finetune"))
    return run


def measure(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict]:
    arguments = [str(run.folder), "--out", str(out), "--backend", "reference", *options]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    deploy_accuracy.main()
    return json.loads(out.read_text())["rows"]


def test_the_engine_labels_as_the_network_does(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [row] = measure(run, tmp_path / "rows.json", monkeypatch, "--dtype", "fp32")
    assert (row["run"], row["images"], row["pixels"]) == ("trained", 3, 3 * 48 * 96)
    assert row["differs_where_certain"] == 0 and row["certain"] > 0.9
    assert row["miou"] == pytest.approx(row["training_miou"], abs=0.01)
    evaluated = evaluate(run)["protocols"]["full"]["miou"]
    assert row["training_miou"] == pytest.approx(100 * evaluated)


def test_every_engine_that_breaks_a_bar_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(Engine, "batch_labels", lambda *given: BATCH_LABELS(*given) * 0)
    message = r"(?s)reference fp32: \d+ labels differ.*reference bf16: mIoU differs by"
    with pytest.raises(SystemExit, match=message):
        measure(run, out, monkeypatch, "--dtype", "fp32", "bf16")
    wrong, _ = json.loads(out.read_text())["rows"]
    assert wrong["differs_where_certain"] > 100 and wrong["differs"] > 0.01


def test_what_is_not_measured_is_no_success(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match="reference fp32: out of time"):
        measure(run, out, monkeypatch, "--seconds", "0")
    with pytest.raises(SystemExit, match="cuda fp32: "):
        measure(run, out, monkeypatch, "--backend", "cuda", "--dtype", "fp32")


@pytest.mark.parametrize(
    ("dtype", "certain", "points", "broken"),
    [
        ("fp32", 0, 0.3, False),
        ("fp32", 1, 0.0, True),
        ("fp16", 9, 0.1, False),
        ("bf16", 9, -0.1, False),
        ("fp16", 9, 0.11, True),
        ("bf16", 9, -0.11, True),
    ],
)
def test_bars(dtype: str, certain: int, points: float, broken: bool) -> None:
    found = {"differs_where_certain": certain, "difference": points}
    assert (broken_bar(dtype, found) is not None) == broken

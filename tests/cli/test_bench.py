"""`lgcnet bench` as a user types it, on networks and images that take milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lgcnet_fast.benchmark import harness
from lgcnet_fast.cli import bench as command
from lgcnet_fast.cli import options
from lgcnet_fast.latency.timing import Protocol
from tests.cli.conftest import call_well, refusal

NETS = "tests.benchmark.nets"


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "FULL_PROTOCOL", Protocol(2, 0.0, 1, 0.001, 2))


def bench(tmp_path: Path, *arguments: object) -> tuple[str, dict]:
    """What is printed and what is stored."""
    out = tmp_path / "bench"
    shown = call_well("bench", *arguments, "--device", "cpu", "--out", out).out
    with Image.open(out / "accuracy_fps.png") as picture:
        assert picture.width > 400
    return shown, json.loads((out / "bench.json").read_text())


def test_a_run_against_a_module(finished_run: Path, tmp_path: Path) -> None:
    arguments = (finished_run, f"{NETS}:tiny")
    shown, values = bench(tmp_path, *arguments)
    # The run's own size, at which its accuracy was measured.
    assert "49x97" in shown and "not read on a CPU" in shown
    runtimes = [(row["runtime"], row["layout"]) for row in values["rows"]]
    assert runtimes == [("deploy", None), ("eager", "nchw"), ("eager", "nhwc")]
    assert values["rows"][0]["miou"] is not None and values["rows"][1]["miou"] is None
    assert values["rows"][0]["agreement"]["equal"] > 0.9
    assert values["hardware"]["clocks"] is None and values["tf32"] is False
    assert str(finished_run.parent.parent) not in json.dumps(values)


def test_a_genotype_in_two_runtimes(tmp_path: Path) -> None:
    arguments = ("--size", "33x47", "--batch", "2", "--classes", "4", "--layout", "nhwc")
    runtimes = ("--runtime", "deploy", "--runtime", "eager")
    _, values = bench(tmp_path, "reference", *arguments, *runtimes)
    assert len(values["rows"]) == 2 and values["case"]["batch"] == 2


def test_an_engine_file(finished_run: Path, tmp_path: Path) -> None:
    from lgcnet_fast.deploy import Segmenter

    Segmenter.load(finished_run, "cpu").save(tmp_path / "street.engine")
    shown, values = bench(tmp_path, tmp_path / "street.engine")
    assert values["rows"][0]["kind"] == "engine" and "street.engine" in shown


def test_logits_only(tmp_path: Path) -> None:
    arguments = ("--size", "33x47", "--logits", "--layout", "nchw")
    shown, values = bench(tmp_path, f"{NETS}:tiny", *arguments)
    assert "to logits" in shown and values["case"]["upsample"] is False


def test_an_exported_file(finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    path = tmp_path / "net.onnx"
    call_well("export", finished_run, "--format", "onnx", "--out", path, "--argmax")
    _, values = bench(tmp_path, path, "--size", "49x97")
    assert values["rows"][0]["runtime"] == "onnxruntime"
    other = ("bench", path, "--size", "49x98", "--device", "cpu", "--out", tmp_path / "other")
    assert "net.onnx: takes inputs (1, 49, 97, 3)" in refusal(*other)


def test_mistakes(tmp_path: Path) -> None:
    out = ("--device", "cpu", "--out", tmp_path / "out", "--size", "33x47")
    tiny = ("bench", f"{NETS}:tiny", *out)
    assert "no_such.module" in refusal("bench", "no_such.module:net", *out)
    assert "FileNotFoundError: weights.pth" in refusal("bench", f"{NETS}:failing", *out)
    assert "gone.onnx: no such file" in refusal("bench", tmp_path / "gone.onnx", *out)
    assert "shape (1, 5)" in refusal("bench", f"{NETS}:Scores", *out)
    assert "multiple of 32" in refusal("bench", f"{NETS}:Choosy", *out)
    assert "did you mean" not in refusal(*tiny, "--runtime", "turbo")
    assert "CUDA graphs need a GPU" in refusal(*tiny, "--runtime", "graph")
    assert "copies 'both'" in refusal(*tiny, "--copies", "both")
    assert "deploy" in refusal(*tiny, "--runtime", "deploy")
    assert "end with the label map" in refusal("bench", "reference", *out, "--logits")
    assert "given more than once" in refusal("bench", f"{NETS}:tiny", *tiny[1:])
    for size in ("33", "33x", "0x5", "axb"):
        assert "height x width" in refusal(*tiny, "--size", size)
    assert "layout" in refusal(*tiny, "--layout", "cnhw")
    assert "fp64" in refusal(*tiny, "--dtype", "fp64")
    assert refusal(*tiny, "--batch", "0")
    assert "backend" in refusal(*tiny, "--backend", "opencl")
    assert not (tmp_path / "out").exists()


def test_a_broken_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    out = ("--device", "cpu", "--out", tmp_path / "out", "--size", "33x47")
    assert "broken.onnx" in refusal("bench", tmp_path / "broken.onnx", *out)


def test_the_help_names_what_there_is() -> None:
    from lgcnet_fast.benchmark import case, plain
    from lgcnet_fast.ops import backend

    assert command.RUNTIMES == harness.RUNTIMES and command.LAYOUTS == plain.LAYOUTS
    assert command.COPIES == case.COPIES
    assert options.BACKENDS == ("auto", *backend.BACKENDS)

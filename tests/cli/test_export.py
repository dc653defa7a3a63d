"""lgcnet export as a user types it, and the examples of docs/export.md."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgcnet_fast.deploy import export as exporting
from lgcnet_fast.deploy import export_torch
from tests.cli.conftest import call_well, refusal

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^lgcnet (export .*)$", PAGE, re.MULTILINE)
SNIPPET = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def documented(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the page's examples are typed in."""
    shutil.copytree(finished_run, tmp_path / "runs" / "camvid")
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "street.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documented_model_runs_as_documented(documented: Path) -> None:
    pytest.importorskip("onnxruntime")
    shown = call_well(*shlex.split(COMMANDS[0])).out
    assert re.search(r"checked on 1 random and 2 real images \(49x97\): largest difference", shown)
    values: dict[str, object] = {}
    exec(SNIPPET, values)
    labels = values["labels"]
    assert labels.shape == (49, 97) and labels.dtype == np.uint8 and labels.max() < 19


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_understood(
    documented: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(run, out, options):
        exporting._check_options(out, options)
        asked.append((out, options))
        raise exporting.UserError("understood")

    asked: list = []
    monkeypatch.setattr(exporting, "export", write)
    if re.search("onnx|tensorrt", command):
        pytest.importorskip("onnx")
    assert refusal(*shlex.split(command)) == "lgcnet: understood\n"
    [(out, options)] = asked
    assert f"--format {options.form} --out {out}" in command
    assert options.dynamic == ("--dynamic" in command)
    assert options.labels == ("--argmax" in command)
    assert options.engine.fp16 == ("--fp16" in command)
    assert options.size == ((720, 960) if "720x960" in command else None)


def test_every_format_is_documented() -> None:
    formats = [re.search(r"--format (\w+)", command)[1] for command in COMMANDS]
    assert set(formats) == set(exporting.FORMATS)


def test_the_help_names_the_formats_that_there_are() -> None:
    from lgcnet_fast.cli import export as command

    assert command.FORMATS == exporting.FORMATS
    assert "lgcnet export " in call_well("export", "--help").out


def test_export_leaves_the_run_as_it_is(finished_run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    out = tmp_path / "new" / "m.pt"
    arguments = ("--format", "torchscript", "--out", out, "--dynamic", "--size", "50x65")
    shown = call_well("export", finished_run, *arguments).out
    assert f"{out}: written" in shown and "50x65" in shown
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_without_tensorrt_the_command_to_build_is_printed(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(program, example, dynamic, opset, path) -> None:
        export_torch.write_torchscript(program, example, path)

    pytest.importorskip("onnx")
    monkeypatch.setattr(exporting.export_tensorrt, "missing_to_build", lambda: "no TensorRT here")
    # What ONNX does is tested elsewhere, and takes seconds.
    monkeypatch.setattr(exporting.export_onnx, "write_onnx", pretend)
    monkeypatch.setattr(exporting.export_onnx, "open_onnx", export_torch.open_torchscript)
    engine = tmp_path / "m.engine"
    arguments = ("--format", "tensorrt", "--out", engine, "--int8", "--dynamic")
    shown = call_well("export", finished_run, *arguments).out
    assert "no engine was built: no TensorRT here" in shown
    assert f"trtexec --onnx={tmp_path}/m.onnx --saveEngine={engine} --minShapes=" in shown
    assert "does not calibrate" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx"}


def test_export_without_the_data_says_so(copied_run: Path, tmp_path: Path) -> None:
    stored = (copied_run / "config.json").read_text()
    gone = stored.replace('"name": "synthetic",', '"name": "camvid", "root": "/gone",', 1)
    gone = gone.replace('"root": null,', "", 1)
    (copied_run / "config.json").write_text(gone)
    arguments = ("--format", "torchscript", "--out", tmp_path / "m.pt")
    shown = call_well("export", copied_run, *arguments).out
    assert "1 random and 0 real" in shown and "no real images: /gone" in shown


def test_export_mistakes(copied_run: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "m.pt")
    script = ("--format", "torchscript")
    assert "not a run folder" in refusal("export", tmp_path, *script, *out)
    assert "onnx, torchscript" in refusal("export", copied_run, "--format", "onyx", *out)
    for size in ("480", "480x", "-1x3", "axb", "360 x 480"):
        assert "height x width" in refusal("export", copied_run, *script, *out, "--size", size)
    assert "32 to 16384" in refusal("export", copied_run, *script, *out, "--size", "8x8")
    assert "tensorrt" in refusal("export", copied_run, *script, *out, "--fp16")
    assert "is a folder" in refusal("export", copied_run, *script, "--out", tmp_path)
    (tmp_path / "file").write_text("x")
    assert "file" in refusal("export", copied_run, *script, "--out", tmp_path / "file" / "m.pt")
    (copied_run / "finetune" / "weights.safetensors").unlink()
    assert "finetune first" in refusal("export", copied_run, *script, *out)
    assert not (tmp_path / "m.pt").exists()

"""`lgcnet lut` as a user types it, with engines and networks that take milliseconds."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from PIL import Image

from lgcnet_fast.benchmark import tables
from lgcnet_fast.latency.engine_table import FitEffort
from lgcnet_fast.latency.measure import Effort
from lgcnet_fast.latency.table import load_table
from lgcnet_fast.space.genotype import load_genotype
from tests.cli.conftest import call_well, refusal

SMALLEST = ("--preset", "smoke", "--classes", "3", "--set", "space.widths=[2, 4, 8]")


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FULL_FIT", FitEffort(networks=12))
    monkeypatch.setattr(tables, "FULL_EFFORT", Effort(1, 2, 10.0, 0.01))


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> None:
    """No measurement looks for garbage among what earlier tests have left or imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def engine_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "tiny.toml").write_text("[latency]\nsize = [33, 65]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "FULL_FIT", FitEffort(networks=12))
        out = ("--out", folder / "engine.json", "--runtime", "deploy")
        shown = call_well("lut", "build", folder / "tiny.toml", *SMALLEST, *out).out
    assert "fitted to 12 networks" in shown and "fewer networks than" in shown
    return folder / "engine.json"


def test_a_table_of_engines_says_what_it_was_made_on(engine_table: Path) -> None:
    table = load_table(engine_table)
    made = table.made_on
    assert (made.provider, made.runtime, made.dtype) == ("fitted", "deploy", "float32")
    assert made.device and made.torch
    assert {entry.op.split(".")[0] for entry in table.entries} >= {"cell", "node", "input"}
    shown = call_well("lut", "show", engine_table).out
    assert "fitted to 12 networks" in shown and "node.cell" in shown


def test_a_search_uses_a_table_of_engines(engine_table: Path, config: Path) -> None:
    settings = (
        *("--set", f"latency.table={engine_table}", "--set", "latency.size=[33, 65]"),
        *("--set", "space.widths=[2, 4, 8]", "--set", "search.strategy=random"),
    )
    out = ("--out", config.parent / "run")
    # The data set has more classes than the table.
    message = refusal("search", config, "--preset", "smoke", *settings, *out)
    assert "const.classifier" in message


def test_check_writes_table_and_plot(engine_table: Path, tmp_path: Path) -> None:
    genotype = tmp_path / "mine.json"
    genotype.write_text(_one_genotype(engine_table))
    arguments = ("--count", "3", "--genotype", genotype, "--device", "cpu")
    shown = call_well("lut", "check", engine_table, "--out", tmp_path / "check", *arguments).out
    assert "uniform" in shown and "varied light share" in shown and "given" in shown
    values = json.loads((tmp_path / "check" / "check.json").read_text())
    assert [len(networks) for networks in values["networks"].values()] == [3, 3, 1]
    for group in values["networks"].values():
        assert all(network["measured_ms"] > 0 for network in group)
    assert set(values["summary"]["uniform"]) >= {"median_error_pct", "rank_correlation"}
    assert str(tmp_path) not in json.dumps(values)
    with Image.open(tmp_path / "check" / "check.png") as picture:
        assert picture.width > 300


def test_check_measures_with_another_runtime_on_request(engine_table: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path, "--count", "1", "--runtime", "eager", "--device", "cpu")
    assert "eager" in call_well("lut", "check", engine_table, *out).out


def test_an_eager_table_of_several_images_a_run(config: Path) -> None:
    table = config.parent / "eager.json"
    build = ("lut", "build", config, *SMALLEST, "--out", table, "--set", "latency.size=[17, 33]")
    call_well(*build, "--batch", "2")
    made = load_table(table).made_on
    assert (made.dtype, made.batch, made.runtime) == ("float32", 2, "eager")
    out = ("--out", config.parent / "check", "--count", "1", "--device", "cpu")
    call_well("lut", "check", table, *out)


def test_check_mistakes(engine_table: Path, config: Path, tmp_path: Path) -> None:
    check = ("lut", "check", engine_table, "--out", tmp_path / "out", "--device", "cpu")
    assert "roofline cannot be measured" in refusal(*check, "--runtime", "roofline")
    assert "did you mean 'eager'" in refusal(*check, "--runtime", "eagre")
    assert refusal(*check, "--count", "0")
    assert "nowhere.json" in refusal(*check, "--genotype", tmp_path / "nowhere.json")
    assert "reductions is (1, 8)" in refusal(*check, "--genotype", "reference")
    assert "nowhere" in refusal("lut", "check", "nowhere", *check[3:])
    broken = json.loads(engine_table.read_text())
    for change in ({"space": "other"}, {"size": [65, 33]}, {"entries": broken["entries"][1:]}):
        path = tmp_path / "broken.json"
        path.write_text(json.dumps(broken | change))
        assert "broken.json" in refusal("lut", "check", path, *check[3:])
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_device_warns_once_and_names_both(
    engine_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.conftest import call

    values = json.loads(engine_table.read_text())
    values["made_on"]["device"] = "NVIDIA Old"
    (tmp_path / "old.json").write_text(json.dumps(values))
    out = ("--out", tmp_path, "--count", "1", "--device", "cpu")
    message = call("lut", "check", tmp_path / "old.json", *out).err
    assert message.count("measured on NVIDIA Old, this is") == 1


def test_list_names_the_shipped_tables() -> None:
    shown = call_well("lut", "list").out
    assert "eager_h200_360x480" in shown and "NVIDIA H200" in shown
    assert "roofline_titanxp" in shown
    assert "NVIDIA H200" in call_well("lut", "show", "eager_h200_360x480").out


def test_build_mistakes(config: Path) -> None:
    build = ("lut", "build", config, *SMALLEST, "--out", config.parent / "table.json")
    assert "dtype 'fp64'" in refusal(*build, "--dtype", "fp64")
    assert "roofline" in refusal(*build, "--runtime", "roofline", "--dtype", "fp16")
    assert refusal(*build, "--batch", "0")
    assert not (config.parent / "table.json").exists()


def test_the_help_names_the_runtimes_and_dtypes_that_there_are() -> None:
    from lgcnet_fast.cli import lut, options
    from lgcnet_fast.deploy.engine import DTYPES
    from lgcnet_fast.latency.providers import RUNTIMES

    assert lut.RUNTIMES == RUNTIMES and options.DTYPES == tuple(DTYPES)


def _one_genotype(table: Path) -> str:
    """The reference genotype with the cells and widths of the table's space."""
    options = load_table(table).options
    values = load_genotype("reference").model_dump(mode="json")
    cells = options["cells"]
    last = cells - 1
    reductions = options["reductions"]
    taps = [reductions[0] - 1, reductions[1] - 1, last]
    stem = values["stem"] | {"widths": [8, 16, options["widths"][0]]}
    changed = {"widths": options["widths"], "reductions": reductions, "taps": taps, "stem": stem}
    return json.dumps(values | changed | {"cells": [["conv3"] * 5] * cells})

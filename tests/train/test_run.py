"""Run folders: what they record and whom they refuse."""

from __future__ import annotations

import json

import pytest

from lgcnet_fast.deploy.run_folder import read_config
from lgcnet_fast.errors import BackendError, ConfigError, RunError
from lgcnet_fast.ops.backend import current_backend, set_backend
from lgcnet_fast.train.prediction import latency_predictor
from lgcnet_fast.train.run import Run
from tests.train.conftest import make_config


@pytest.fixture
def backend_restored(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    set_backend("auto")


def test_records_configuration_and_environment(new_run):
    run = new_run(seed=3, finetune__lr=0.02)
    stored = read_config(run.folder)
    assert stored == run.config
    assert (stored.seeds, stored.finetune.lr) == ((3,), 0.02)
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["precision"] == "fp32"
    assert (environment["backend"], environment["tuning_table"]) == ("auto", None)


def test_opens_with_its_own_configuration(new_run):
    run = new_run(seed=3)
    again = Run.open(run.folder)
    assert again.config == run.config
    assert again.seed == 3


def test_other_configuration_is_refused_by_key(new_run):
    new_run().finish("search", {"epochs": 1})
    with pytest.raises(
        RunError, match=r"finetune\.lr was 0\.05 and is now 0\.5.*another run folder"
    ):
        new_run(finetune__lr=0.5)
    with pytest.raises(RunError, match=r"space\.width was None and is now 8"):
        new_run(space={"name": "tests.train.toy:ToySpace", "width": 8})
    with pytest.raises(RunError, match="seeds"):
        new_run(seed=1)


def test_folder_in_which_no_stage_began_takes_another_configuration(new_run):
    run = new_run()
    run.latency_table_path.write_text("of the former configuration")
    assert new_run(finetune__lr=0.5).config.finetune.lr == 0.5
    assert read_config(run.folder).finetune.lr == 0.5
    assert not run.latency_table_path.exists()


@pytest.mark.usefixtures("backend_restored")
def test_machine_keys_may_change(new_run):
    new_run().finish("search", {"epochs": 1})
    new_run(data__cache="ram")
    new_run(backend="reference")
    new_run(strict_backend=True)


@pytest.mark.usefixtures("backend_restored")
def test_the_backend_holds_for_the_process(new_run):
    run = new_run(backend="reference")
    assert current_backend() == ("reference", False)
    new_run(seed=1, strict_backend=True)
    assert current_backend() == ("auto", True)
    Run.read(run.folder)
    assert current_backend() == ("auto", False)


@pytest.mark.usefixtures("backend_restored")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_the_device_lacks_is_refused_before_any_work(new_run, tmp_path, backend):
    with pytest.raises(BackendError, match=f"'{backend}' cannot serve here: it needs an NVIDIA"):
        new_run(backend=backend, device="cpu")
    assert not (tmp_path / "run").exists()


def test_foreign_folder_is_refused(new_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("...")
    with pytest.raises(RunError, match="neither empty nor a run folder"):
        new_run()
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"seeds": ' + "[" * 5000])
def test_damaged_configuration_names_the_file(new_run, content):
    run = new_run()
    (run.folder / "config.json").write_text(content)
    with pytest.raises((RunError, ConfigError), match="config.json"):
        Run.open(run.folder)


def test_damaged_result_names_the_file(new_run):
    run = new_run()
    run.finish("search", {"epochs": 1})
    (run.folder / "search" / "done.json").write_text("{")
    with pytest.raises(RunError, match="done.json"):
        run.stage_result("search")


@pytest.mark.parametrize("stage, key", [("derive", "latency_ms"), ("evaluate", "protocols")])
def test_results_that_lack_what_the_summary_reads_are_damaged(new_run, stage, key):
    run = new_run()
    run.finish(stage, {"other": 1})
    with pytest.raises(RunError, match=f"lacks '{key}'; delete it to do its stage again"):
        run.stage_result(stage)


def test_missing_genotype_names_the_stage(new_run):
    run = new_run()
    with pytest.raises(RunError, match="missing; run the stage derive first"):
        run.genotype()
    run.finish("derive", {"latency_ms": 1.0})
    with pytest.raises(RunError, match="delete .*done.json and run the stage derive first"):
        run.genotype()


def test_damaged_table_names_the_way_back(new_run):
    run = new_run()
    run.latency_table_path.write_text("{}")
    with pytest.raises(RunError, match=r"(?s)latency_table\.json: .*or delete it"):
        latency_predictor(run)


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run: cannot be used as run folder .*--out"):
        Run(tmp_path / "file" / "run", make_config(tmp_path), 0)

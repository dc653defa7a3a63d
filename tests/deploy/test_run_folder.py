"""Run folders: what the stages wrote is read, and what is missing or damaged is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lgcnet_fast.data.classes import CAMVID
from lgcnet_fast.deploy import Segmenter
from lgcnet_fast.deploy.run_folder import (
    load_weights,
    read_classes,
    read_config,
    read_genotype,
    read_trained_run,
    seed_folders,
)
from lgcnet_fast.errors import ConfigError, GenotypeError, RunError, UserError
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.weights import save_weights
from tests.deploy.run_folders import SIZE, make_run_folder

FILES = ["config.json", "genotype.json", "classes.json", "finetune/weights.safetensors"]


@pytest.fixture
def run_copy(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run" / "seed-0"))


def test_what_was_written_is_read(run_folder: Path) -> None:
    run = read_trained_run(run_folder)
    assert run.config.evaluate.size == SIZE
    assert run.genotype == load_genotype(run_folder / "genotype.json")
    assert run.classes == CAMVID and (run.classes.colours == CAMVID.colours).all()
    assert not run.network.training


def test_the_stages_read_the_same(run_folder: Path) -> None:
    trained, run = read_trained_run(run_folder), Run.read(run_folder)
    assert (run.genotype(), run.classes) == (trained.genotype, trained.classes)
    weights, expected = run.trained_network().state_dict(), trained.network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"not a run folder \(it has no config\.json\); `lgcnet run --out"),
        ("genotype.json", r"genotype\.json: missing; run the stage derive first"),
        ("classes.json", r"classes\.json: missing; `lgcnet run .*seed-0` writes it again"),
        (
            "finetune/weights.safetensors",
            r"weights\.safetensors: missing; run the stage finetune first",
        ),
    ],
)
def test_unfinished_runs(run_copy: Path, name: str, message: str) -> None:
    (run_copy / name).unlink()
    with pytest.raises(RunError, match=message):
        read_trained_run(run_copy)
    with pytest.raises(RunError, match=message):
        Segmenter.load(run_copy)


@pytest.mark.parametrize(
    ("name", "stage"), [("genotype.json", "derive"), ("finetune/weights.safetensors", "finetune")]
)
def test_a_stage_that_is_marked_as_done_has_to_be_unmarked(
    run_copy: Path, name: str, stage: str
) -> None:
    (run_copy / stage).mkdir(exist_ok=True)
    (run_copy / stage / "done.json").write_text("{}")
    (run_copy / name).unlink()
    with pytest.raises(RunError, match=rf"delete .*done\.json and run the stage {stage} first"):
        read_trained_run(run_copy)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"name": 1}', "\x00", '{"name": ' + "[" * 5000]
)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(run_copy: Path, name: str, content: str) -> None:
    (run_copy / name).write_text(content)
    with pytest.raises(UserError, match=Path(name).name):
        read_trained_run(run_copy)


def test_files_that_are_no_text(run_copy: Path) -> None:
    for name, read, error in (
        ("config.json", read_config, RunError),
        ("genotype.json", read_genotype, GenotypeError),
        ("classes.json", read_classes, RunError),
    ):
        (run_copy / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(error, match=name):
            read(run_copy)


def test_a_configuration_with_a_wrong_key(run_copy: Path) -> None:
    (run_copy / "config.json").write_text('{"finetune": {"lrr": 1}}')
    with pytest.raises(ConfigError, match=r"config\.json: .*'finetune\.lrr'"):
        read_config(run_copy)


def test_classes_that_do_not_fit_together(run_copy: Path) -> None:
    classes = run_copy / "classes.json"
    classes.write_text(
        '{"name": "a", "names": ["b", "c"], "colours": [[0, 0, 0]], "output_ids": [0]}'
    )
    with pytest.raises(RunError, match="equally long.*delete it, and `lgcnet run"):
        read_classes(run_copy)


def test_weights_of_another_run(run_copy: Path, tmp_path: Path) -> None:
    other = make_run_folder(tmp_path / "other", widths=[4, 8, 32])
    shutil.copy(other / "finetune" / "weights.safetensors", run_copy / "finetune")
    with pytest.raises(RunError, match=r"weights\.safetensors: belongs to another network"):
        read_trained_run(run_copy)


def test_missing_foreign_and_truncated_weights(tmp_path: Path) -> None:
    path = tmp_path / "pretrain" / "weights.safetensors"
    with pytest.raises(RunError, match="missing; run the stage pretrain first"):
        load_weights(nn.Linear(2, 2), path)
    save_weights(nn.Linear(3, 2), path)
    with pytest.raises(RunError, match="belongs to another network.*weight"):
        load_weights(nn.Linear(2, 2), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match="damaged"):
        load_weights(nn.Linear(3, 2), path)


def test_the_folder_above_the_seeds_names_them(run_copy: Path) -> None:
    for seed in (10, 2):
        shutil.copytree(run_copy, run_copy.with_name(f"seed-{seed}"))
    with pytest.raises(RunError, match=r"name one of .*seed-0, .*seed-2, .*seed-10"):
        Segmenter.load(run_copy.parent)
    assert [path.name for path in seed_folders(run_copy.parent)] == ["seed-0", "seed-2", "seed-10"]
    assert seed_folders(run_copy) == [run_copy]

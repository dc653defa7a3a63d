"""Runs and stages as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.conftest import call, call_well, refusal
from tests.combinations import some_combinations

STAGES = ("search", "derive", "pretrain", "finetune")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def lines(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def new(config: Path, *arguments: object) -> tuple[object, ...]:
    """Arguments of a new run in the folder `new` beside the configuration."""
    return (config, "--preset", "smoke", "--out", config.parent / "new", *arguments)


# -- whole runs -----------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(finished_run: Path) -> None:
    for stage in STAGES:
        assert (finished_run / stage / "done.json").exists()
    scores = read(finished_run / "evaluation.json")["protocols"]["full"]
    # A few steps on two images may hit nothing; what was scored has classes all the same.
    assert 0 <= scores["miou"] <= 1 and scores["constant_miou"] > 0
    assert read(finished_run / "genotype.json")["space"] == "lgcnet"
    assert read(finished_run / "classes.json")["names"][0] == "road"
    assert list(read(finished_run / "summary.json")["seeds"]) == ["0"]
    for picture in ("predictions/contact_sheet.png", "curves.png"):
        with Image.open(finished_run / picture) as image:
            assert image.width > 900
    assert len(list((finished_run / "predictions").glob("*_overlay.png"))) == 2


def test_a_finished_run_is_not_done_again(finished_run: Path) -> None:
    weights = finished_run / "finetune" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    shown = call_well("run", finished_run).out
    assert weights.stat().st_mtime_ns == before
    for part in ("latency_ms", "road", "best constant", "predictions"):
        assert part in shown


def test_several_seeds_have_a_summary(config: Path) -> None:
    quick = ("--set", "seeds=[3, 5]", "--set", "search.strategy=random",
             "--set", "pretrain.enabled=false")  # fmt: skip
    shown = call_well("run", *new(config, *quick)).out
    root = config.parent / "new"
    summary = read(root / "summary.json")
    assert set(summary["seeds"]) == {"3", "5"}
    assert summary["std"]["miou_full"] >= 0
    assert "2 seeds" in shown and "seed 5" in shown
    genotypes = [(root / f"seed-{seed}" / "genotype.json").read_text() for seed in (3, 5)]
    assert genotypes[0] != genotypes[1]
    assert "road" in call_well("eval", root / "seed-5").out
    assert shown.endswith(call_well("run", root).out)
    source = config.parent / "in" / "a.png"
    source.parent.mkdir()
    Image.new("RGB", (20, 10)).save(source)
    message = refusal("predict", root, source, "--out", config.parent / "out")
    assert "seed-3" in message and "seed-5" in message


def test_a_given_genotype_needs_no_search(config: Path, finished_run: Path) -> None:
    given = finished_run / "genotype.json"
    call_well("run", *new(config, "--genotype", given, "--set", "pretrain.enabled=false"))
    run = config.parent / "new"
    assert read(run / "genotype.json") == read(given)
    assert not (run / "search" / "checkpoint.pt").exists()
    assert read(run / "derive" / "done.json")["origin"] == "given"


def test_the_default_folder_has_the_name_of_the_configuration(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    call_well("search", config, "--preset", "smoke", "--set", "search.strategy=random")
    assert Path("runs/tiny/config.json").exists()


# -- stages alone, and continuing -----------------------------------------------------------------


def test_stages_alone_do_what_a_run_does(config: Path, finished_run: Path) -> None:
    call_well("search", *new(config))
    run = config.parent / "new"
    for stage in ("derive", "pretrain", "finetune"):
        assert stage in call_well(stage, run).out
    shown = call_well("eval", run).out
    assert "road" in shown and "bisenet_speed" in shown
    assert (run / "genotype.json").read_text() == (finished_run / "genotype.json").read_text()
    assert read(run / "evaluation.json") == read(finished_run / "evaluation.json")


@pytest.mark.parametrize(
    ("stage", "missing", "lost"),
    [
        ("derive", "search", ("search/done.json", "derive/done.json")),
        ("pretrain", "derive", ("genotype.json", "pretrain/done.json")),
        ("finetune", "derive", ("genotype.json", "finetune/done.json")),
        ("eval", "finetune", ("finetune/weights.safetensors", "evaluation.json")),
    ],
)
def test_a_stage_names_the_one_before(
    copied_run: Path, stage: str, missing: str, lost: tuple[str, ...]
) -> None:
    for name in lost:
        (copied_run / name).unlink()
    assert f"run the stage {missing} first" in refusal(stage, copied_run)


def test_an_interrupted_run_continues(config: Path) -> None:
    """Ctrl-C in the middle of the search; then the same command to the end."""
    run = config.parent / "new"
    arguments = [*new(config), "--set", "search.epochs=5", "--set", "pretrain.enabled=false"]
    # Where the tests run in the background, their processes ignore interrupts by default.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listen}; from lgcnet_fast.cli import main; main()"
    command = [sys.executable, "-c", program, "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        until = time.monotonic() + 60
        while not (run / "search" / "checkpoint.pt").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=60)[1]
    assert process.returncode == 130, message
    assert "continues" in message and "Traceback" not in message
    assert not (run / "search" / "done.json").exists()
    done = torch.load(run / "search" / "checkpoint.pt", weights_only=True)["epochs_done"]
    call_well("search", *arguments)
    epochs = [line["epoch"] for line in lines(run, "search") if "entropy" in line]
    assert 1 <= done < 5 and epochs == list(range(5))


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--set", "serch.epochs=3"), ("serch", "search")),
        (("--set", "space.cels=3"), ("space.cels", "cells")),
        (("--set", "space.name=lgcnt"), ("lgcnt", "lgcnet")),
        (("--set", "space.name=no.such:Space"), ("no.such",)),
        (("--set", "search.epochs=0"), ("search.epochs",)),
        (("--set", "device=cuda:77"), ("cuda:77",)),
        (("--set", "data.name=camvid", "--set", "data.root=nowhere"), ("nowhere",)),
        (("--set", "data.val_split=exam"), ("exam", "val")),
        (("--set", "latency.table=nowhere.json"), ("nowhere.json",)),
        (("--set", "search.latency_target_ms=1e6"), ("latency_target_ms",)),
        (("--set", "finetune.coarse_epochs=1"), ("coarse_epochs", "cityscapes")),
        (("--set", "pretrain.data=nowhere"), ("nowhere",)),
        (("--genotype", "refrence"), ("refrence", "reference")),
        (("--genotype", "reference"), ("genotype", "space")),
    ],
)
def test_a_mistake_is_refused_before_any_work(
    config: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    message = refusal("run", *new(config, *arguments))
    assert all(part in message for part in parts), message
    assert not (config.parent / "new" / "search").exists()


def test_a_refused_run_leaves_its_folder_usable(config: Path) -> None:
    refusal("run", *new(config, "--genotype", "refrence"))
    call_well("search", *new(config, "--set", "search.strategy=random"))


@pytest.mark.parametrize("preset", ["smok", ""])
def test_unknown_presets(config: Path, preset: str) -> None:
    if preset:
        assert "'smoke'" in refusal("run", config, "--preset", preset)
    else:
        assert "cannot read" in refusal("run", config.parent / "missing.toml")


def test_run_folders_keep_their_configuration(copied_run: Path, config: Path) -> None:
    changed = ("--preset", "smoke", "--out", copied_run, "--set", "finetune.lr=1")
    assert "finetune.lr was" in refusal("run", config, *changed)
    assert "own configuration" in refusal("run", copied_run, "--set", "finetune.lr=1")


def test_folders_that_are_no_runs(config: Path) -> None:
    occupied = config.parent / "thesis"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("...")
    assert "neither empty" in refusal("run", config, "--preset", "smoke", "--out", occupied)
    for stage in ("derive", "pretrain", "finetune", "eval", "run", "search"):
        assert "not a run folder" in refusal(stage, occupied)
    assert "tiny.toml" in refusal("run", config, "--preset", "smoke", "--out", config)
    assert "tiny.toml" in refusal("run", config, "--preset", "smoke", "--out", config / "below")
    assert [path.name for path in occupied.iterdir()] == ["thesis.tex"]


DAMAGES = {
    "config.json": "run",
    "classes.json": "eval",
    "genotype.json": "eval",
    "finetune/weights.safetensors": "eval",
    "finetune/checkpoint.pt": "finetune",
    "search/checkpoint.pt": "derive",
    "search/done.json": "search",
    "latency_table.json": "derive",
}
CONTENTS = (b"", b"{}", b"\x80\x02garbage", b'{"version": 99}')


@some_combinations("name, content", tuple(DAMAGES), CONTENTS)
def test_damaged_files_are_named(copied_run: Path, name: str, content: bytes) -> None:
    stage = DAMAGES[name]
    for result in (f"{stage}/done.json", "evaluation.json"):
        if stage not in ("run", "search"):
            (copied_run / result).unlink(missing_ok=True)
    (copied_run / name).write_bytes(content)
    result = call(stage, copied_run)
    # An empty object is a valid configuration and a valid result.
    if (name, content[:1]) in {("config.json", b"{"), ("search/done.json", b"{")}:
        assert result.status in (0, 2)
    else:
        assert result.status == 2 and Path(name).name in result.err, result.err

"""`lgcnet run`, which does all stages, and one command for each stage alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lgcnet_fast.cli.options import (
    ConfigOrRun,
    Overrides,
    Preset,
    RunFolder,
    configuration,
)
from lgcnet_fast.config import RunConfig
from lgcnet_fast.errors import ConfigError

Out = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Run folder.  [default: runs/NAME, as the configuration]"),
]
GivenGenotype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.json",
        help="Train this genotype (reference, or a genotype.json) instead of searching.",
    ),
]


def run(
    source: ConfigOrRun = None,
    preset: Preset = None,
    out: Out = None,
    genotype: GivenGenotype = None,
    overrides: Overrides = None,
) -> None:
    """Do the whole job: search, derive, pretrain, finetune, evaluate, draw predictions.

    What is finished is skipped, and what was interrupted goes on after its last finished epoch.

    Examples:

        lgcnet run --preset smoke

        lgcnet run camvid.toml --out runs/camvid --set "seeds=[0, 1, 2]"

        lgcnet run camvid.toml --genotype reference --out runs/reference

        lgcnet run runs/camvid
    """
    given = [*(overrides or ()), *([f"genotype={genotype}"] if genotype else ())]
    folder, config = _folder_and_config(source, preset, out, given)
    from lgcnet_fast.cli.folders import open_runs
    from lgcnet_fast.cli.summary import print_summary
    from lgcnet_fast.train.distributed import leave
    from lgcnet_fast.train.illustrate import illustrate
    from lgcnet_fast.train.pipeline import run_all

    summary = run_all(folder, config)
    runs = open_runs(folder)
    if runs[0].ranks.first:
        print_summary(runs, summary, [illustrate(run) for run in runs])
    leave()


def search(
    source: ConfigOrRun = None,
    preset: Preset = None,
    out: Out = None,
    overrides: Overrides = None,
) -> None:
    """Search only: supernet weights and architecture parameters.

    Example:

        lgcnet search camvid.toml --out runs/camvid
    """
    folder, config = _folder_and_config(source, preset, out, overrides or [])
    from lgcnet_fast.cli.summary import print_stage
    from lgcnet_fast.train.distributed import leave
    from lgcnet_fast.train.pipeline import check, open_runs, run_stage

    runs = open_runs(folder, config)
    check(runs[0])
    for run in runs:
        print_stage(run, "search", run_stage(run, "search"))
    leave()


def derive(folder: RunFolder) -> None:
    """Turn the searched architecture parameters into genotype.json."""
    _stage_alone(folder, "derive")


def pretrain(folder: RunFolder) -> None:
    """Pretrain the derived network's backbone as an image classifier."""
    _stage_alone(folder, "pretrain")


def finetune(folder: RunFolder) -> None:
    """Train the derived network for segmentation."""
    _stage_alone(folder, "finetune")


def evaluate(folder: RunFolder) -> None:
    """Score the trained network on val: mIoU and IoU of each class."""
    _stage_alone(folder, "evaluate")


def register(app: typer.Typer) -> None:
    """Adds the commands in the order of the stages."""
    app.command()(run)
    app.command()(search)
    app.command()(derive)
    app.command()(pretrain)
    app.command()(finetune)
    app.command("eval")(evaluate)


def _stage_alone(folder: Path, stage: str) -> None:
    from lgcnet_fast.cli.folders import open_runs
    from lgcnet_fast.cli.summary import print_stage
    from lgcnet_fast.train.distributed import leave
    from lgcnet_fast.train.pipeline import run_stage

    for run in open_runs(folder):
        print_stage(run, stage, run_stage(run, stage))
    leave()


def _folder_and_config(
    source: Path | None, preset: str | None, out: Path | None, overrides: list[str]
) -> tuple[Path, RunConfig]:
    """Where to run what: a new run from a configuration, or an existing run folder's own."""
    if source is None or not source.is_dir():
        name = source.stem if source else preset or "paper"
        return out or Path("runs", name), configuration(source, preset, overrides)
    if preset or out or overrides:
        raise ConfigError(
            f"{source}: a run folder continues with its own configuration and takes no options; "
            "for another run, give a configuration file and another --out"
        )
    from lgcnet_fast.cli.folders import stored_config

    return source, stored_config(source)

"""`lgcnet data`: what a data set holds and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lgcnet_fast.cli.console import console
from lgcnet_fast.cli.options import ConfigFile, Overrides, Preset
from lgcnet_fast.config import load_config
from lgcnet_fast.errors import ConfigError

if TYPE_CHECKING:
    from lgcnet_fast.data.check import SplitReport
    from lgcnet_fast.data.classes import ClassSet

PROBLEMS_SHOWN = 50

app = typer.Typer(help="Check and look at data sets.", no_args_is_help=True)


@app.command()
def check(config: ConfigFile = None, preset: Preset = None, overrides: Overrides = None) -> None:
    """Look at every file of the training and validation splits. Exit status 1 on problems.

    Finds missing and unreadable files, sizes that differ, ids that no class has and images that
    two splits share; prints the share of each class.

    Examples:

        lgcnet data check camvid.toml

        lgcnet data check --set data.name=cityscapes --set data.root=/data/cityscapes
    """
    settings = load_config(config, preset or "smoke", tuple(overrides or ()))
    from lgcnet_fast.data.check import check_dataset

    report = check_dataset(settings.data)
    if report.classes is not None:
        console().print(_shares(report.classes, report.splits))
    for problem in report.problems[:PROBLEMS_SHOWN]:
        typer.echo(f"{problem.file}: {problem.fault}; {problem.remedy}")
    if len(report.problems) > PROBLEMS_SHOWN:
        typer.echo(f"and {len(report.problems) - PROBLEMS_SHOWN} more")
    found = len(report.problems)
    typer.echo("1 problem" if found == 1 else f"{found or 'no'} problems")
    if found:
        raise typer.Exit(1)


@app.command()
def show(
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="Split.  [default: data.val_split]")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images, evenly spread.")] = 6,
    out: Annotated[Path, typer.Option(metavar="PNG", help="Picture.")] = Path("samples.png"),
) -> None:
    """Draw some images with their labels on one sheet.

    Example:

        lgcnet data show --preset smoke --out samples.png
    """
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name the PNG file to write")
    settings = load_config(config, preset or "smoke", tuple(overrides or ()))
    from lgcnet_fast.data.dataset import image_and_label, open_dataset
    from lgcnet_fast.report.pictures import contact_sheet, save_picture

    dataset = open_dataset(settings.data, split or settings.data.val_split)
    count = min(count, len(dataset))
    samples = []
    for index in (place * len(dataset) // count for place in range(count)):
        image, label = image_and_label(dataset, index)
        samples.append((dataset.stem(index), image, (label,)))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(out, contact_sheet(samples, dataset.classes, ("image", "label")))
    typer.echo(f"{count} of {len(dataset)} images: {out}")


def _shares(classes: ClassSet, splits: Sequence[SplitReport]) -> Table:
    """Share of each class in each split, ignored pixels last."""
    table = Table("pixels in %", title=f"{classes.name}, {len(classes)} classes")
    for split in splits:
        table.add_column(f"{split.split}\n{split.images} images", justify="right")
    for index, name in enumerate(classes.names):
        table.add_row(name, *(f"{100 * split.shares[index]:.2f}" for split in splits))
    table.add_row("ignored", *(f"{100 * split.ignored_share:.2f}" for split in splits))
    return table

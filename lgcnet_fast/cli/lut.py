"""`lgcnet lut`: the latency tables that searches use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lgcnet_fast.cli.console import console
from lgcnet_fast.cli.counting import counting
from lgcnet_fast.cli.options import ConfigFile, Overrides, Preset, configuration

if TYPE_CHECKING:
    from lgcnet_fast.latency.table import LookupTable

app = typer.Typer(help="Build and show latency tables.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option(metavar="TABLE.json", help="File to write.")],
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    provider: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="measured (one image a run), measured_batch8, or roofline_titanxp.",
        ),
    ] = "measured",
    classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes.  [default: the data set's]")
    ] = None,
) -> None:
    """Measure every operation of the search space on this device, at the target resolution.

    Then set `latency.table` to the file.

    Example:

        lgcnet lut build camvid.toml --out titanxp.json --classes 11
    """
    settings = configuration(config, preset, overrides)
    from lgcnet_fast.data.dataset import open_dataset
    from lgcnet_fast.doctor import check_device
    from lgcnet_fast.latency.build import build_table
    from lgcnet_fast.latency.providers import make_provider
    from lgcnet_fast.latency.table import save_table
    from lgcnet_fast.space.registry import make_space

    space = make_space(settings.space)
    maker = make_provider(provider, check_device(settings.device))
    if classes is None:
        classes = len(open_dataset(settings.data, settings.data.val_split).classes)
    with counting("lut build") as progress:
        table = build_table(space, settings.latency.size, classes, maker, progress)
    save_table(table, out)
    capped = sum(entry.capped for entry in table.entries)
    console().print(f"{len(table.entries)} entries: {out}")
    if capped:
        console().print(f"{capped} entries reached their time limit above 1 % spread")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="TABLE.json", help="Table to show.")],
) -> None:
    """Print where a table comes from and its entries, the slowest first."""
    from lgcnet_fast.latency.table import load_table

    table = load_table(path)
    made = table.made_on
    versions = ", ".join(
        f"{name} {value}"
        for name, value in (("driver", made.driver), ("torch", made.torch), ("CUDA", made.cuda))
        if value
    )
    console().print(f"{table.description}, batch {made.batch}{', ' + versions if versions else ''}")
    console().print(f"space {table.space}, input {table.size[0]}x{table.size[1]} (height x width)")
    console().print(_entries(table))


def _entries(table: LookupTable) -> Table:
    shown = Table("operation", "channels", "size", "stride", "ms", "spread %", "runs")
    for column in shown.columns[1:]:
        column.justify = "right"
    for entry in sorted(table.entries, key=lambda entry: -entry.median_ms):
        shown.add_row(
            entry.op,
            f"{entry.c_in} -> {entry.c_out}",
            f"{entry.h_in}x{entry.w_in}",
            str(entry.stride),
            f"{entry.median_ms:.4f}",
            f"{100 * entry.spread:.1f}",
            f"{entry.runs}{' (capped)' if entry.capped else ''}",
        )
    return shown

"""`lgcnet lut`: the latency tables that searches use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lgcnet_fast.cli.console import console
from lgcnet_fast.cli.counting import counting
from lgcnet_fast.cli.lut_check import check
from lgcnet_fast.cli.options import (
    ConfigFile,
    DtypeName,
    Overrides,
    Preset,
    TableName,
    configuration,
)

if TYPE_CHECKING:
    from lgcnet_fast.latency.table import LookupTable

RUNTIMES = ("eager", "deploy", "roofline")
"""As latency.providers.RUNTIMES, which cannot be imported here without torch."""
MANY_CAPPED = "reached their time limit above 1 % spread"

app = typer.Typer(help="Build, check and show latency tables.", no_args_is_help=True)

app.command()(check)


@app.command()
def build(
    out: Annotated[Path, typer.Option(metavar="TABLE.json", help="File to write.")],
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="|".join(RUNTIMES),
            autocompletion=lambda: list(RUNTIMES),
            help="What runs the networks: plain PyTorch, measured operation by operation; "
            "deployed engines, measured whole; or an estimated Titan Xp.",
        ),
    ] = "eager",
    dtype: DtypeName = "fp32",
    batch: Annotated[
        int, typer.Option(min=1, help="Images a run; entries are for one of them.")
    ] = 1,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes.  [default: the data set's]")
    ] = None,
) -> None:
    """Measure the operations of the search space on this device, at the target resolution.

    Then set `latency.table` to the file.

    Examples:

        lgcnet lut build camvid.toml --out titanxp.json --classes 11

        lgcnet lut build camvid.toml --out h200_fp16.json --runtime deploy --dtype fp16
    """
    settings = configuration(config, preset, overrides)
    from lgcnet_fast.benchmark.tables import make_table
    from lgcnet_fast.data.dataset import open_dataset
    from lgcnet_fast.doctor import check_device
    from lgcnet_fast.latency.table import save_table
    from lgcnet_fast.space.registry import make_space

    space = make_space(settings.space)
    device = check_device(settings.device)
    if classes is None:
        classes = len(open_dataset(settings.data, settings.data.val_split).classes)
    with counting("lut build") as progress:
        table = make_table(
            space,
            settings.latency.size,
            classes,
            runtime,
            device,
            dtype,
            batch,
            settings.backend,
            progress,
        )
    save_table(table, out)
    console().print(f"{len(table.entries)} entries: {out}")
    _print_quality(table)


@app.command()
def show(table: TableName) -> None:
    """Print where a table comes from and its entries, the slowest first."""
    from lgcnet_fast.latency.shipped import find_table

    found = find_table(table)
    made = found.made_on
    versions = ", ".join(
        f"{name} {value}"
        for name, value in (("driver", made.driver), ("torch", made.torch), ("CUDA", made.cuda))
        if value
    )
    console().print(f"{found.description}, batch {made.batch}{', ' + versions if versions else ''}")
    console().print(f"space {found.space}, input {found.size[0]}x{found.size[1]} (height x width)")
    _print_quality(found)
    console().print(_entries(found))


@app.command("list")
def list_tables() -> None:
    """Print the tables that come with the package, as `latency.table` takes them."""
    from lgcnet_fast.latency.providers import ROOFLINE
    from lgcnet_fast.latency.shipped import find_table, shipped_tables

    shown = Table("name", "device", "runtime", "numbers", "input", "classes")
    for name in shipped_tables():
        table = find_table(name)
        made, (height, width) = table.made_on, table.size
        size, classes = f"{height}x{width}", str(table.num_classes)
        shown.add_row(name, made.device, made.runtime, made.dtype, size, classes)
    shown.add_row(ROOFLINE, "NVIDIA TITAN Xp (estimated)", "roofline", "float32", "any", "any")
    console().print(shown)


def _print_quality(table: LookupTable) -> None:
    capped = sum(entry.capped for entry in table.entries)
    if capped:
        console().print(f"{capped} entries {MANY_CAPPED}")
    if table.fit is not None:
        fit = table.fit
        console().print(
            f"fitted to {fit.networks} networks in {fit.seconds:.0f} s; networks left out are "
            f"predicted to {100 * fit.median_error:.1f} % (median), {100 * fit.worst_error:.1f} % "
            "(worst)"
        )
        if fit.networks < len(table.entries):
            console().print(
                f"fewer networks than the {len(table.entries)} entries: the split among operations "
                "follows an estimate"
            )


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

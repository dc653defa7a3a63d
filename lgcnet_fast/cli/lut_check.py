"""`lgcnet lut check`: what a table predicts against what networks take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lgcnet_fast.cli.console import console
from lgcnet_fast.cli.counting import counting
from lgcnet_fast.cli.options import ConfigFile, DeviceName, TableName, configuration
from lgcnet_fast.errors import TableError
from lgcnet_fast.files import replacing

if TYPE_CHECKING:
    from lgcnet_fast.latency.check import LatencyCheck
    from lgcnet_fast.latency.table import LookupTable
    from lgcnet_fast.space.base import SearchSpace


def check(
    table: TableName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for check.json and check.png.")],
    config: ConfigFile = None,
    count: Annotated[
        int, typer.Option(min=1, help="Random genotypes of each of the two kinds.")
    ] = 50,
    genotypes: Annotated[
        list[str] | None,
        typer.Option("--genotype", metavar="NAME|FILE", help="One more to measure; repeatable."),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="eager|deploy", help="What to measure with.  [default: the table's]"),
    ] = None,
    device: DeviceName = "auto",
) -> None:
    """Measure random genotypes on this device and compare with what a table predicts.

    Half of them are uniform; of the others, the share of light operations is from 0.1 to 0.9. None
    of them is one that the table was fitted to. CONFIG.toml is needed only for a search space that
    is a plug-in.

    Example:

        lgcnet lut check h200_fp16.json --out check --genotype runs/camvid/genotype.json
    """
    from lgcnet_fast.benchmark.tables import check_latencies
    from lgcnet_fast.doctor import check_device
    from lgcnet_fast.latency.hardware import device_name
    from lgcnet_fast.latency.shipped import find_table
    from lgcnet_fast.latency.table import check_table
    from lgcnet_fast.space.genotype import load_genotype

    found = find_table(table)
    space = _space_of(found, table, config)
    target = check_device(device)
    name = device_name(target)
    for warning in check_table(found, table, space, found.size, found.num_classes, name):
        typer.echo(f"warning: {warning}", err=True)
    given = {_short(each): load_genotype(each) for each in genotypes or ()}
    with counting("lut check") as progress:
        result = check_latencies(found, space, target, runtime, count, given, progress)
    _write_check(result, out)
    _print_check(result, out)


def _space_of(table: LookupTable, name: str, config: Path | None) -> SearchSpace:
    """The space that a table was built for; a configuration makes a plug-in known."""
    from lgcnet_fast.space.registry import make_space, registered_spaces

    if config is not None:
        configuration(config, None, None)
    if table.space not in registered_spaces():
        raise TableError(
            f"{name}: built for the search space {table.space!r}, not known here; give the "
            "configuration that names it: lgcnet lut check TABLE CONFIG.toml"
        )
    return make_space({"name": table.space, **table.options})


def _short(genotype: str) -> str:
    """Without the folders of one machine, but with that of the run."""
    return "/".join(Path(genotype).parts[-2:])


def _write_check(result: LatencyCheck, out: Path) -> None:
    from lgcnet_fast.report.latency_check import draw_latency_check

    with replacing(out / "check.json") as temporary:
        temporary.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    with replacing(out / "check.png") as temporary:
        draw_latency_check(result, temporary)


def _print_check(result: LatencyCheck, out: Path) -> None:
    made, measured = result.table, result.measured_on
    console().print(f"predicted: {made.device}, {made.runtime}, {made.dtype}")
    console().print(f"measured:  {measured.device}, {measured.runtime}, {measured.dtype}")
    shown = Table("networks", "", "median error %", "worst %", "searchable %", "worst %", "ranks")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, group in result.summary().items():
        figures = [
            group["median_error_pct"],
            group["worst_error_pct"],
            group["searchable_median_error_pct"],
            group["searchable_worst_error_pct"],
        ]
        ranks = group["rank_correlation"]
        shown.add_row(
            name,
            str(group["networks"]),
            *("-" if figure is None else f"{figure:.2f}" for figure in figures),
            "-" if ranks is None else f"{ranks:.3f}",
        )
    console().print(shown)
    console().print(f"written: {out / 'check.json'}, {out / 'check.png'}")

"""`lgcnet doctor`: what of this machine works, and how to mend the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lgcnet_fast.cli.console import console
from lgcnet_fast.doctor import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    cache: Annotated[
        Path | None, typer.Option(help="Folder whose disk is looked at.  [default: data cache]")
    ] = None,
) -> None:
    """Check Python, torch, GPU, driver, backends, memory, disk and extras.

    Exit status 1 if any fails.
    """
    from lgcnet_fast.config import DataConfig
    from lgcnet_fast.data.cache import cache_folder
    from lgcnet_fast.doctor import diagnose

    findings = [*diagnose(cache or cache_folder(DataConfig())), *_backends()]
    table = Table("", "what", "found", "remedy")
    for finding in findings:
        status = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(status, finding.name, finding.detail, finding.remedy)
    console().print(table)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


def _backends() -> list[Finding]:
    """None where torch cannot be imported, which is a finding already."""
    try:
        from lgcnet_fast.ops.verdicts import backend_findings
    except (ImportError, OSError):
        return []
    return backend_findings()

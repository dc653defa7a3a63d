"""What the stages have to say at their end, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lgcnet_fast.cli.console import console
from lgcnet_fast.train.pipeline import STAGES
from lgcnet_fast.train.run import Run


def print_stage(run: Run, stage: str, result: Mapping[str, Any]) -> None:
    """The headline numbers of one stage; for `evaluate` the scores of each class."""
    if not run.ranks.first:
        return
    evaluated = stage == "evaluate"
    console().print(_class_table([run]) if evaluated else _stage_table([(run, stage, result)]))


def print_summary(runs: Sequence[Run], summary: Mapping[str, Any], sheets: Sequence[Path]) -> None:
    """Tables of a finished run: its stages, the scores of each class, the mean over several
    seeds, and where the pictures are."""
    results = [(run, stage, run.stage_result(stage) or {}) for run in runs for stage in STAGES]
    console().print(_stage_table([row for row in results if row[1] != "evaluate"]))
    console().print(_class_table(runs))
    if len(runs) > 1:
        console().print(_seeds_table(summary))
    for sheet in sheets:
        console().print(f"pictures: {sheet.parent}", soft_wrap=True)


def _stage_table(rows: Sequence[tuple[Run, str, Mapping[str, Any]]]) -> Table:
    table = Table("run", "stage", "result", title="Stages")
    for run, stage, result in rows:
        table.add_row(str(run.folder), stage, _headline(result))
    return table


def _headline(result: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in result.items() if value is not None and value != []}
    return "\n".join(f"{key} {_value(value)}" for key, value in shown.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return "; ".join(str(entry) for entry in value)
    return str(value)


def _class_table(runs: Sequence[Run]) -> Table:
    """IoU in per cent: one row a class, one column a run and protocol."""
    table = Table("IoU in %", title="Evaluation")
    columns = []
    for run in runs:
        evaluation = run.stage_result("evaluate") or {"protocols": {}}
        for protocol, scores in evaluation["protocols"].items():
            name = protocol if len(runs) == 1 else f"seed {run.seed}\n{protocol}"
            table.add_column(name, justify="right")
            columns.append(scores)
    for name in runs[0].classes.names:
        table.add_row(name, *(_percent(scores["class_iou"].get(name)) for scores in columns))
    table.add_section()
    table.add_row("mean", *(_percent(scores["miou"]) for scores in columns))
    table.add_row("best constant", *(_percent(scores["constant_miou"]) for scores in columns))
    return table


def _seeds_table(summary: Mapping[str, Any]) -> Table:
    """Mean and standard deviation over the seeds, as in summary.json."""
    table = Table("", "mean", "std", title=f"{len(summary['seeds'])} seeds")
    for key, mean in summary["mean"].items():
        table.add_row(key, f"{mean:.4g}", f"{summary['std'][key]:.4g}")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"

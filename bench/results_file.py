"""Where measured numbers go: one JSON a measurement, and the flat summary that the docs quote."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def provenance(commit: str) -> dict[str, Any]:
    """Device, versions, commit and command of this measurement."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit,
        "command": " ".join(["python", *map(_without_folders, sys.argv)]),
    }


def _without_folders(argument: str) -> str:
    """Where something lies on one machine tells nobody anything."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def update_summary(
    entries: dict[str, tuple[float, str]], origin: dict[str, Any], path: Path
) -> None:
    """Adds name -> (value, unit) to the flat summary at `path`, keeping what is already there."""
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, (value, unit) in entries.items():
        summary[name] = {
            "value": value,
            "unit": unit,
            "device": origin["device"],
            "commit": origin["commit"],
            "command": origin["command"],
        }
    write_json(path, dict(sorted(summary.items())))

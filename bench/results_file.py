"""Where measured numbers go: one JSON a measurement, and the flat summary that the docs quote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def current_commit() -> str:
    """Short hash of the checkout, with a + if files differ from it; `unknown` outside one."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(describe, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def provenance(commit: str) -> dict[str, Any]:
    """Device, versions, commit and command of this measurement."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit,
        "command": " ".join(["python", *_program(), *map(_without_folders, sys.argv[1:])]),
    }


def _program() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec else [Path(sys.argv[0]).name]


def _without_folders(argument: str) -> str:
    """Where something lies on one machine tells nobody anything."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Rows:
    """Rows of a results file, each on disk as soon as it is there.

    A row replaces an earlier one with the same `identity`, so that a measurement can be made in
    several commands; each row says which command made it.
    """

    def __init__(
        self, path: Path, origin: dict[str, Any], identity: Callable[[dict[str, Any]], Any]
    ) -> None:
        self._path, self._identity = path, identity
        self._command = origin["command"]
        self.content = {**read_json(path), **origin}
        self.content.setdefault("rows", [])

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, row: dict[str, Any]) -> None:
        kept = [other for other in self.rows if self._identity(other) != self._identity(row)]
        self.content["rows"] = [*kept, {**row, "command": self._command}]
        write_json(self._path, self.content)


def update_summary(
    entries: dict[str, tuple[float, str]], origin: dict[str, Any], path: Path
) -> None:
    """Adds name -> (value, unit) to the flat summary at `path`, keeping what is already there."""
    summary = read_json(path)
    for name, (value, unit) in entries.items():
        summary[name] = {
            "value": value,
            "unit": unit,
            "device": origin["device"],
            "commit": origin["commit"],
            "command": origin["command"],
        }
    write_json(path, dict(sorted(summary.items())))

"""Running the command line many times side by side, and reading what the runs scored."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def run_together(commands: list[list[str]], logs: Path, jobs: int | None = None) -> None:
    """Runs the commands at once (at most `jobs`): one network leaves most of a GPU idle.

    Exits naming the log folder if one of them fails.
    """
    logs.mkdir(parents=True, exist_ok=True)

    def run(indexed: tuple[int, list[str]]) -> int:
        index, command = indexed
        with (logs / f"{command[1]}-{index}.log").open("w", encoding="utf-8") as stream:
            return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode

    with ThreadPoolExecutor(jobs or len(commands)) as pool:
        codes = list(pool.map(run, enumerate(commands)))
    if any(codes):
        sys.exit(f"exit codes {codes}; see {logs}")


def score(run: Path) -> dict[str, Any]:
    """mIoU in percent, predicted latency and parameters of a finished run folder."""
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    derived = json.loads((run / "derive" / "done.json").read_text(encoding="utf-8"))
    return {
        "miou": 100 * evaluation["protocols"]["full"]["miou"],
        "latency_ms": derived["latency_ms"],
        "parameters": derived["parameters"],
    }

"""Takes the headline numbers of results files into bench/results/summary.json.

    python -m bench.summarise bench/results/search_step_h200.json bench/results/depthwise_h200.json

Which numbers a file has follows from its rows; headlines.py says which of them stand for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import headlines
from bench.results_file import RESULTS, read_json, update_summary


def entries_of(content: dict[str, Any]) -> headlines.Entries:
    if "summary" in content:
        return headlines.latency_check(content)
    if content.get("fit"):
        return headlines.latency_table(content)
    rows = content.get("rows", [])
    training = [row for row in rows if "stage" in row]
    deployed = [row for row in rows if "network" in row]
    return {
        **headlines.training(training),
        **headlines.kernels(rows),
        **headlines.deployed(deployed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--summary", type=Path, default=RESULTS / "summary.json")
    parser.add_argument("--commit", help="of files that do not say")
    options = parser.parse_args()
    for path in options.files:
        content = read_json(path)
        entries = entries_of(content)
        if not entries:
            raise SystemExit(f"{path}: no headline number; is it a results file?")
        update_summary(entries, _origin(content, options.commit), options.summary)
        for name, (value, unit) in entries.items():
            print(f"{name:<40} {value:10.3f} {unit}")


def _origin(content: dict[str, Any], commit: str | None) -> dict[str, Any]:
    measured = content.get("measured_on") or content.get("made_on") or {}
    return {
        "device": content.get("device") or measured.get("device", "unknown"),
        "commit": content.get("commit") or commit or "unknown",
        "command": content.get("command", "lgcnet lut"),
    }


if __name__ == "__main__":
    main()

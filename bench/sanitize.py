"""Every CUDA kernel of csrc under compute-sanitizer: memcheck, racecheck, initcheck.

    python -m bench.sanitize --out bench/results/sanitizer_DEVICE.json

Watches `bench.sanitizer_launches`. PyTorch's kernels are passed over; initcheck has to follow them,
because they write what ours read, but what it says about them is only counted. Before that, a
planted fault must be found, or else the sanitizer would be clean for want of looking. PyTorch takes
every tensor from CUDA itself (no caching), so that each has bounds and is new.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bench.device import CUDA
from bench.options import Deadline, parser
from bench.results_file import provenance, read_json, write_json

OURS = "lgcnet::"
FILTER = ("--kernel-name", "kns=lgcnet")
"""Kernels whose mangled name contains this."""
TOOLS = {
    "memcheck": (*FILTER, "--padding", "256"),
    "racecheck": (*FILTER, "--racecheck-report", "all"),
    "initcheck": (),
}
PLANTED = {"memcheck": "out_of_bounds", "initcheck": "uninitialised"}
COMMON = ("--show-backtrace", "no", "--report-api-errors", "no", "--print-limit", "200")
PREFIX = "========= "


class Findings(NamedTuple):
    """What a log holds, repeated messages counted."""

    ours: dict[str, int]
    """About our kernels, or about no kernel in particular."""
    elsewhere: int
    """About kernels of others."""
    finished: bool
    """Whether the log has the summary with which every tool ends."""


def find_sanitizer() -> str:
    """Exits saying what is missing."""
    path = os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    found = shutil.which("compute-sanitizer", path=path)
    if found is None:
        raise SystemExit(
            "compute-sanitizer is missing: it comes with the CUDA toolkit; put its bin folder on "
            "the PATH"
        )
    return found


def version(sanitizer: str) -> str:
    answer = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"[Vv]ersion ([\d.]+)", answer)
    return match[1] if match else answer.strip()


def read_log(text: str) -> Findings:
    """A message begins at the margin; what is indented below belongs to it."""
    lines = [line[len(PREFIX) :] for line in text.splitlines() if line.startswith(PREFIX)]
    finished = any("SUMMARY:" in line for line in lines)
    messages: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and messages:
            messages[-1].append(line.strip())
        elif line.strip() and "SUMMARY:" not in line and not line.startswith("COMPUTE-SANITIZER"):
            messages.append([line.strip()])
    ours: Counter[str] = Counter()
    elsewhere = 0
    for title, *details in messages:
        place = next((line for line in details if line.startswith("at ")), "")
        if place and OURS not in "".join([title, *details]):
            elsewhere += 1
        else:
            ours[f"{title} {place.partition('+')[0]}".strip()] += 1
    return Findings(dict(ours.most_common()), elsewhere, finished)


def watch(sanitizer: str, tool: str, seconds: float, fault: str = "") -> dict[str, Any]:
    """One run of the launches under a tool."""
    with tempfile.TemporaryDirectory() as folder:
        log, launched = Path(folder) / "log", Path(folder) / "launched.json"
        watched = [sys.executable, "-m", "bench.sanitizer_launches", "--out", str(launched)]
        watched += ["--plant", fault] if fault else []
        command = [sanitizer, "--tool", tool, *TOOLS[tool], *COMMON, "--log-file", str(log)]
        begun = time.monotonic()
        try:
            done = subprocess.run(
                [*command, *watched],
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(seconds, 1),
            )
            failure = "" if launched.exists() else done.stdout[-2000:]
        except subprocess.TimeoutExpired:
            failure = f"not finished in {seconds:.0f} s"
        findings = read_log(log.read_text(errors="replace") if log.exists() else "")
        return {
            "options": " ".join((*TOOLS[tool], *COMMON)),
            "seconds": round(time.monotonic() - begun, 1),
            "errors": sum(findings.ours.values()),
            "findings": findings.ours,
            "about_other_kernels": findings.elsewhere,
            "failure": failure or ("" if findings.finished else "the tool wrote no summary"),
            **read_json(launched),
        }


def judge(tool: str, row: dict[str, Any]) -> list[str]:
    """What is wrong with a tool's result."""
    faults = [f"{count} x {message}" for message, count in row["findings"].items()]
    if row["failure"]:
        faults.append(row["failure"])
    if row.get("planted_found") == 0:
        faults.append(f"a planted fault ({PLANTED[tool]}) was not found")
    return faults


def main() -> None:
    options = _options()
    sanitizer = find_sanitizer()
    if not CUDA:
        raise SystemExit("no CUDA GPU here: compute-sanitizer watches kernels on one")
    deadline = Deadline(options.seconds)
    result = provenance(options.commit) | {"sanitizer": version(sanitizer), "tools": {}}
    faults = 0
    for tool in options.tools:
        row = watch(sanitizer, tool, deadline.left)
        if tool in PLANTED:
            row["planted_found"] = watch(sanitizer, tool, deadline.left, PLANTED[tool])["errors"]
        wrong = judge(tool, row)
        faults += len(wrong)
        print(f"{tool}: {row['errors']} errors, {row['seconds']:.0f} s", *wrong, sep="\n  ")
        result["tools"][tool] = row
        result["clean"] = faults == 0
        write_json(options.out, result)
    if faults:
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    options = parser("every CUDA kernel under compute-sanitizer")
    options.add_argument("--tools", nargs="+", choices=tuple(TOOLS), default=tuple(TOOLS))
    return options.parse_args()


if __name__ == "__main__":
    main()

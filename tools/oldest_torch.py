"""Runs the CPU tests on the oldest torch that is supported, in an environment of its own.

    python tools/oldest_torch.py --folder FOLDER --out bench/results/torch_2_7_1_cpu.json

FOLDER, outside the repository, gets a clone of the commit and the environment (5 GB); what is there
already is used again, so the command can be repeated. Triton is the one of that torch, numpy the
last that its interpreter works with. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STACK = ("torch==2.7.1", "triton==3.3.1", "numpy<2.4")
REPORTED = ("torch", "triton", "numpy", "pytest")
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "LGCNET_FAST_BUILD_CUDA": "0", "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, folder: Path = ROOT, check: bool = True) -> str:
    """What a command prints. Exits with it where the command fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
    )
    if check and done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def check_out(checkout: Path) -> str:
    """The commit of this repository, cloned; what is not committed is not tested."""
    commit = run("git", "rev-parse", "HEAD").strip()
    if not checkout.exists():
        run("git", "clone", "--quiet", "--no-checkout", ROOT, checkout)
    run("git", "fetch", "--quiet", ROOT, commit, folder=checkout)
    run("git", "checkout", "--quiet", "--force", commit, folder=checkout)
    return commit[:7]


def install(environment: Path, checkout: Path) -> Path:
    """The environment's Python, with the stack and everything that tests import."""
    python = environment / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", environment)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *STACK)
    # The stack once more: an extra may ask for a newer numpy.
    run(*pip, *STACK, "-e", f"{checkout}[all,test]")
    return python


def versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as found, json, platform;"
        f"print(json.dumps({{name: found.version(name) for name in {REPORTED}}}"
        " | {'python': platform.python_version()}))"
    )
    return json.loads(run(python, "-c", code))


def test(python: Path, checkout: Path, report: Path, jobs: int, arguments: Sequence[str]) -> None:
    """Writes JUnit's XML to `report`."""
    report.unlink(missing_ok=True)
    pytest = (python, "-m", "pytest", "-q", "-n", str(jobs), "--dist", "loadfile")
    print(run(*pytest, f"--junitxml={report}", *arguments, folder=checkout, check=False)[-4000:])
    if not report.exists():
        sys.exit("pytest wrote no report")


def read_report(report: Path, commit: str) -> dict[str, dict[str, str]]:
    """By test: its outcome, the message of a failure or skip, and the commit."""
    tests = {}
    for case in xml.parse(report).iter("testcase"):
        outcome, told = "passed", find(case, "failure", "error", "skipped")
        if told is not None:
            outcome = "skipped" if told.tag == "skipped" else "failed"
        message = "" if told is None else told.get("message", "").partition("\n")[0][:300]
        name = f"{case.get('classname')}::{case.get('name')}"
        tests[name] = {"outcome": outcome, "message": message, "commit": commit}
    return tests


def summary(tests: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Numbers of tests, why some were skipped, which failed, and what commits they are of."""

    def having(outcome: str) -> dict[str, str]:
        return {name: one["message"] for name, one in tests.items() if one["outcome"] == outcome}

    passed, failed, skipped = map(having, ("passed", "failed", "skipped"))
    return {
        "passed": len(passed),
        "failed": len(failed),
        "skipped": len(skipped),
        "skip_reasons": dict(Counter(skipped.values()).most_common()),
        "failures": failed,
        "tests_by_commit": dict(Counter(one["commit"] for one in tests.values())),
    }


def find(case: xml.Element, *kinds: str) -> xml.Element | None:
    return next((part for part in case if part.tag in kinds), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="outside the repository")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--again", action="store_true", help="only what failed last time; the rest stays as it was"
    )
    parser.add_argument("tests", nargs="*", default=["tests"], help="folders or files")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if folder.is_relative_to(ROOT):
        parser.error(f"--folder {options.folder}: lies in the repository")
    folder.mkdir(parents=True, exist_ok=True)
    checkout, report = folder / "checkout", folder / "report.xml"
    earlier = folder / "outcomes.json"
    commit = check_out(checkout)
    python = install(folder / "environment", checkout)
    arguments = [*options.tests, *(["--last-failed"] if options.again else [])]
    test(python, checkout, report, options.jobs, arguments)
    tests = json.loads(earlier.read_text(encoding="utf-8")) if options.again else {}
    tests |= read_report(report, commit)
    earlier.write_text(json.dumps(tests), encoding="utf-8")
    result = {
        "device": "CPU",
        "commit": commit,
        "command": " ".join(["python tools/oldest_torch.py", *arguments]),
        "versions": versions(python),
        **summary(tests),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

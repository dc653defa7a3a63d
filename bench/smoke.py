"""Whether every measurement works here, on tiny shapes: the first thing to run on a new machine.

    python -m bench.smoke --out FOLDER [--jobs N]

Each runs in a process of its own; its output goes to FOLDER. The times mean nothing.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from bench.device import CUDA

KERNELS = Path(__file__).parent / "kernels"
BACKENDS = ("triton", "cuda") if CUDA else ("reference",)
STOCK = ("graph-nhwc",) if CUDA else ("eager-nchw",)
STEPS = ("--dry", "--rounds", "1", "--steps", "1", "--precision", "fp32", "--stock", *STOCK)


@dataclass(frozen=True)
class Run:
    name: str
    arguments: tuple[str, ...]

    def result(self, folder: Path, seconds: float) -> tuple[bool, str]:
        """Whether it went well, and a line about it."""
        out = folder / f"{self.name}.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", *self.arguments, "--out", str(out)]
        begun = time.monotonic()
        with (folder / f"{self.name}.log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                code = process.wait(seconds)
                verdict = f"{code}: {_last_line(log)}" if code else "ok"
            except subprocess.TimeoutExpired:
                verdict = f"more than {seconds:.0f} s: {_last_line(log)}"
                _end(process)
        return verdict == "ok", f"{self.name:<34} {time.monotonic() - begun:6.1f} s  {verdict}"


def _last_line(log: TextIO) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or [""])[-1]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupted, a measurement ends the processes that it has started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def runs(folder: Path) -> Iterator[Run]:
    for path in sorted(KERNELS.glob("*.py")):
        is_family = "FAMILY = " in path.read_text(encoding="utf-8")
        if not is_family or (path.stem.startswith("native") and not CUDA):
            continue
        module = f"bench.kernels.{path.stem}"
        for backend in BACKENDS if path.stem == "operations" else ("",):
            chosen = ("--backend", backend) if backend else ()
            name = "-".join(filter(None, (path.stem, backend)))
            yield Run(name, (module, "--part", "dry", *chosen))
    for backend in BACKENDS:
        for step in ("search_step", "finetune_step"):
            yield Run(f"{step}-{backend}", (f"bench.{step}", *STEPS, "--ours", f"ours-{backend}"))
        deploy = ("bench.deploy", "--dry", "--ours", backend, "--stock", *STOCK)
        yield Run(f"deploy-{backend}", deploy)
    if CUDA:  # elsewhere the interpreter takes minutes
        yield Run("tune", ("bench.tune", "--dry", "--folder", str(folder)))
        yield Run("trajectory", ("bench.trajectory", "--dry"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=4 if CUDA else 1)
    parser.add_argument("--seconds", type=float, default=240, help="for each run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        chosen = list(runs(options.out))
        for well, line in pool.map(lambda run: run.result(options.out, options.seconds), chosen):
            print(line, flush=True)
            failed += not well
    if failed:
        raise SystemExit(f"{failed} of {len(chosen)} do not work; see the logs in {options.out}")


if __name__ == "__main__":
    main()

"""The deploy engine against plain PyTorch: frames a second, latency, host time.

    python -m bench.deploy --out FILE
    python -m bench.deploy --out FILE --ours cuda --dtype fp32
    python -m bench.deploy --out FILE --genotypes random --size 769x1537 360x480 720x960

A frame goes from uint8 images to uint8 label maps of their size, both on the GPU, for all alike.
Labels are compared first. Every stock subject shares a process and its rounds with ours. Compiling
takes minutes: with --jobs several are built side by side, which are timed one after the other.
"""

from __future__ import annotations

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from bench.device import require_gpu
from bench.genotypes import RANDOM, expanded
from bench.options import Deadline, image_size, parser
from bench.process import Worker, WorkerFailed
from bench.results_file import Rows, provenance
from bench.training.command import TINY_SIZE, TINY_SPACE
from lgcnet_fast.benchmark.case import Case

TARGET = "bench.deploy_server:DeployServer"
STOCK = tuple(
    f"{kind}-{layout}" for kind in ("eager", "graph", "autotuned") for layout in ("nchw", "nhwc")
)

TIMING_SECONDS = 120
"""A comparison that is built and takes longer hangs."""


@dataclass(frozen=True)
class Subject:
    genotype: str
    space: dict[str, Any]
    case: Case

    def __str__(self) -> str:
        height, width = self.case.size
        return f"{self.genotype} {self.case.batch} x {height}x{width} {self.case.dtype}"

    @property
    def arguments(self) -> dict[str, Any]:
        return {"case": asdict(self.case), "genotype": self.genotype, "space": self.space}

    @property
    def columns(self) -> dict[str, Any]:
        return {"network": str(self), "genotype": self.genotype, **asdict(self.case)}


@dataclass(frozen=True)
class Comparison:
    subject: Subject
    stock: str
    ours: str
    check: bool
    """Whether labels are compared before, which once a subject is enough."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.stock}"

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.subject.arguments, "ours": self.ours}

    @property
    def columns(self) -> dict[str, Any]:
        return {**self.subject.columns, "subject": self.stock, "ours": self.ours}


def main() -> None:
    options = _options()
    require_gpu(options.dry)
    deadline = Deadline(options.seconds)
    rows = Rows(options.out, provenance(options.commit), _identity)
    subjects = _subjects(options)
    comparisons = [
        Comparison(subject, stock, options.ours, check=stock == options.stock[0])
        for stock in options.stock
        for subject in subjects
    ]
    for first in range(0, len(comparisons), options.jobs):
        if deadline.over:
            print(f"out of time: {comparisons[first]} and what follows left out")
            return
        within = min(options.build_seconds, deadline.left)
        _compare(comparisons[first : first + options.jobs], within, rows)


def _compare(comparisons: list[Comparison], within: float, rows: Rows) -> None:
    """Built side by side, each in a process of its own; then timed one after the other."""
    with ExitStack() as stack:
        built = [Built(comparison, Worker(TARGET)) for comparison in comparisons]
        for each in built:
            stack.callback(each.worker.end)
        with ThreadPoolExecutor(len(built)) as pool:
            list(pool.map(lambda each: each.build(within), built))
        for each in built:
            _time(each, rows)


class Built:
    """A comparison in its process."""

    def __init__(self, comparison: Comparison, worker: Worker) -> None:
        self.comparison, self.worker = comparison, worker
        self.labels: dict[str, Any] | None = None
        self.failure = ""

    def build(self, within: float) -> None:
        """Compares labels, if that is asked for, and builds both."""
        deadline = Deadline(within)
        try:
            if self.comparison.check:
                self.labels = self.worker.ask("check", within, **self.comparison.arguments)
            self.worker.ask(
                "build", deadline.left, stock=self.comparison.stock, **self.comparison.arguments
            )
        except WorkerFailed as error:
            self.failure = str(error)


def _time(built: Built, rows: Rows) -> None:
    comparison, labels = built.comparison, built.labels
    if labels is not None:
        rows.add({**comparison.columns, "subject": f"{comparison.ours} labels", **labels})
        print(f"{comparison.subject}: {labels['differs']:.2e} of the labels differ", flush=True)
        if not labels["right"]:
            raise SystemExit(f"WRONG RESULT: {comparison.ours} {comparison.subject}: {labels}")
    found: dict[str, Any] = {"failed": built.failure}
    if not built.failure:
        try:
            found = built.worker.ask("compare", TIMING_SECONDS)
        except WorkerFailed as error:
            found = {"failed": str(error)}
    built.worker.end()
    rows.add({**comparison.columns, **found})
    print(f"{comparison}: {_told(comparison, found)}", flush=True)


def _told(comparison: Comparison, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    return (
        f"{found['fps']:.0f} FPS, {comparison.ours} {found['ours_fps']:.0f} FPS "
        f"({found['ours_latency_ms']:.3f} ms, host {found['ours_host_us'] or 0:.0f} us), "
        f"speed-up {found['speed_up']:.2f}"
    )


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    return row["network"], row["subject"], row.get("ours", "")


def _subjects(options: argparse.Namespace) -> list[Subject]:
    if options.dry:
        return [Subject(RANDOM[0], TINY_SPACE, Case(TINY_SIZE))]
    choices = (expanded(options.genotypes), options.size, options.batch, options.dtype)
    return [
        Subject(genotype, {}, Case(size, batch, dtype))
        for genotype, size, batch, dtype in itertools.product(*choices)
    ]


def _options() -> argparse.Namespace:
    options = parser("the deploy engine")
    options.add_argument(
        "--ours", choices=("auto", "triton", "cuda", "reference"), default="triton"
    )
    options.add_argument("--stock", choices=STOCK, nargs="*", default=STOCK)
    options.add_argument("--genotypes", nargs="+", default=["reference"])
    options.add_argument("--size", type=image_size, nargs="+", default=[(769, 1537)])
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), nargs="+", default=["fp16", "fp32"]
    )
    options.add_argument(
        "--build-seconds",
        type=float,
        default=240,
        help="a comparison whose networks take longer to compile is given up",
    )
    options.add_argument("--jobs", type=int, default=1, help="comparisons built side by side")
    options.add_argument("--dry", action="store_true", help="a tiny network on the CPU")
    return options.parse_args()


if __name__ == "__main__":
    main()

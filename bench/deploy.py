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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

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

T = TypeVar("T")
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

    def __str__(self) -> str:
        return f"{self.subject}: {self.stock}"

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.subject.arguments, "ours": self.ours, "stock": self.stock}

    @property
    def columns(self) -> dict[str, Any]:
        return {**self.subject.columns, "subject": self.stock, "ours": self.ours}


def main() -> None:
    options = _options()
    require_gpu(options.dry)
    deadline = Deadline(options.seconds)
    rows = Rows(options.out, provenance(options.commit), _identity)
    subjects = _subjects(options)
    for some in _groups(subjects, options.jobs):
        _check(some, options.ours, options.build_seconds, rows)
    comparisons = [
        Comparison(subject, stock, options.ours) for stock in options.stock for subject in subjects
    ]
    for group in _groups(comparisons, options.jobs):
        if deadline.over:
            print(f"out of time: {group[0]} and what follows left out")
            return
        _compare(group, min(options.build_seconds, deadline.left), rows)


def _groups(items: list[T], size: int) -> Iterator[list[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _check(subjects: list[Subject], ours: str, within: float, rows: Rows) -> None:
    """Side by side, each in a process of its own."""
    arguments = [{**subject.arguments, "ours": ours} for subject in subjects]
    with _asked("check", arguments, within) as answers:
        for subject, (_, found) in zip(subjects, answers, strict=True):
            if isinstance(found, WorkerFailed):
                raise SystemExit(f"{ours} {subject}: {found}")
            rows.add({**subject.columns, "subject": f"{ours} labels", **found})
            print(f"{subject} {ours}: {found['differs']:.2e} of the labels differ", flush=True)
            if not found["right"]:
                raise SystemExit(f"WRONG RESULT: {ours} {subject}: {found}")


def _compare(comparisons: list[Comparison], within: float, rows: Rows) -> None:
    """Built side by side, each in a process of its own; then timed one after the other."""
    arguments = [comparison.arguments for comparison in comparisons]
    with _asked("build", arguments, within) as answers:
        for comparison, (worker, failure) in zip(comparisons, answers, strict=True):
            found = failure or _answer(worker, "compare", TIMING_SECONDS)
            if isinstance(found, WorkerFailed):
                found = {"failed": str(found)}
            worker.end()
            rows.add({**comparison.columns, **found})
            print(f"{comparison}: {_told(comparison, found)}", flush=True)


@contextmanager
def _asked(
    call: str, every: list[dict[str, Any]], within: float
) -> Iterator[list[tuple[Worker, Any]]]:
    """Workers that live as long as the `with` block, and what each has answered."""
    with ExitStack() as stack, ThreadPoolExecutor(len(every)) as pool:
        workers = [Worker(TARGET) for _ in every]
        for worker in workers:
            stack.callback(worker.end)
        answers = pool.map(
            lambda pair: _answer(pair[0], call, within, **pair[1]), zip(workers, every, strict=True)
        )
        yield list(zip(workers, answers, strict=True))


def _answer(worker: Worker, call: str, within: float, **arguments: Any) -> Any:
    """Or why there is none."""
    try:
        return worker.ask(call, within, **arguments)
    except WorkerFailed as error:
        return error


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

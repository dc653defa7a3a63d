"""The deploy engine against plain PyTorch: frames a second, latency, host time.

    python -m bench.deploy --out FILE
    python -m bench.deploy --out FILE --ours cuda --dtype fp32
    python -m bench.deploy --out FILE --genotypes random --size 769x1537 360x480 720x960

A frame goes from uint8 images to uint8 label maps of their size, both on the GPU, for all alike.
Labels are compared first. Every stock subject shares a process and its rounds with ours.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass
from typing import Any

from bench.device import require_gpu
from bench.genotypes import RANDOM, expanded
from bench.options import Deadline, image_size, parser
from bench.process import WorkerFailed, Workers
from bench.results_file import Rows, provenance
from bench.training.command import TINY_SIZE, TINY_SPACE
from lgcnet_fast.benchmark.case import Case

TARGET = "bench.deploy_server:DeployServer"
STOCK = tuple(
    f"{kind}-{layout}" for kind in ("eager", "graph", "autotuned") for layout in ("nchw", "nhwc")
)


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


def main() -> None:
    options = _options()
    require_gpu(options.dry)
    deadline = Deadline(options.seconds)
    rows = Rows(options.out, provenance(options.commit), _identity)
    subjects = _subjects(options)
    with Workers(TARGET) as processes:
        for subject in subjects:
            _check(processes, subject, options, rows)
    for stock in options.stock:
        with Workers(TARGET) as processes:
            for subject in subjects:
                if deadline.over:
                    print(f"out of time: {stock} on {subject} and what follows left out")
                    return
                within = min(options.build_seconds, deadline.left)
                _compare(processes, subject, stock, options.ours, within, rows)


def _check(processes: Workers, subject: Subject, options: argparse.Namespace, rows: Rows) -> None:
    try:
        found = processes.ask(
            "check", options.build_seconds, **subject.arguments, ours=options.ours
        )
    except WorkerFailed as error:
        raise SystemExit(f"{options.ours} {subject}: {error}") from None
    rows.add({**subject.columns, "subject": f"{options.ours} labels", **found})
    print(f"{subject} {options.ours}: {found['differs']:.2e} of the labels differ", flush=True)
    if not found["right"]:
        raise SystemExit(f"WRONG RESULT: {options.ours} {subject}: {found}")


def _compare(
    processes: Workers, subject: Subject, stock: str, ours: str, within: float, rows: Rows
) -> None:
    about = {**subject.columns, "subject": stock, "ours": ours}
    try:
        found = processes.ask("compare", within, **subject.arguments, ours=ours, subject=stock)
    except WorkerFailed as error:
        rows.add({**about, "failed": str(error)})
        print(f"{subject}: {stock} failed: {error}", flush=True)
        return
    rows.add({**about, **found})
    host = found["ours_host_us"]
    print(
        f"{subject}: {stock} {found['fps']:.0f} FPS, {ours} {found['ours_fps']:.0f} FPS "
        f"({found['ours_latency_ms']:.3f} ms, host {host or 0:.0f} us), "
        f"speed-up {found['speed_up']:.2f}",
        flush=True,
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
        help="a comparison that takes longer is given up",
    )
    options.add_argument("--dry", action="store_true", help="a tiny network on the CPU")
    return options.parse_args()


if __name__ == "__main__":
    main()

"""Whether a search with the kernels goes as one with the reference: losses step by step, in fp32.

    python -m bench.trajectory --out FILE
    python -m bench.trajectory --out FILE --ours cuda cuda-graph --size 256x512

First the reference with several seeds, then ours with the same ones, each in a process of its own
and side by side on one GPU. With the same seed they share weights, noise and scenes: the losses of
the first 20 steps may differ by 2 %. Later rounding alone drives them apart. The means of steps 150
to 200 differ between seeds; ours, averaged over the seeds because a single one is outside as often
as not by chance, must lie among those of the reference. How far rounding drives losses apart,
whatever computes them, second references show, whose weights differ by one part in ten million at
the start.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean
from threading import Lock
from typing import Any

from bench.device import CUDA, require_gpu
from bench.options import Deadline, image_size, parser
from bench.process import Worker, WorkerFailed
from bench.results_file import Rows, provenance

TARGET = "bench.trajectory_server:TrajectoryServer"
REFERENCE = "reference"
NUDGED = "reference-nudged"
OURS = ("triton", "triton-graph", "cuda", "cuda-graph")
TOLERANCE = 0.02
"""Relative, of the loss of each early step."""


@dataclass(frozen=True)
class Course:
    """What is trained on, and which steps are compared."""

    space: dict[str, Any]
    batch: int
    size: tuple[int, int]
    images: int
    early: int
    """So many steps are compared one by one."""
    late: tuple[int, int]
    """The mean over these steps is compared: from, to (excluded, and the last of all)."""
    at_once: int
    """Steps between two writings of the results."""


DRY_STEPS = 3 if CUDA else 1
"""A recorded step is replayed from the third on; interpreted ones take minutes."""
DRY_SPACE = {"cells": 3, "reductions": [1, 2], "taps": [0, 1, 2], "widths": [4, 4, 8]}
DRY = Course(DRY_SPACE, 2, (33, 33), images=4, early=1, late=(0, DRY_STEPS), at_once=1)

Losses = list[float]


class Trajectories:
    """Runs subjects side by side; every row is on disk as it grows."""

    def __init__(self, course: Course, rows: Rows, deadline: Deadline) -> None:
        self._course, self._rows, self._deadline = course, rows, deadline
        self._lock = Lock()

    def run(self, subjects: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Losses]:
        """Losses of every subject and seed; those that failed or had no time are left out."""
        with ThreadPoolExecutor(len(subjects)) as pool:
            found = list(pool.map(lambda subject: self._run(*subject), subjects))
        last = self._course.late[1]
        return {
            subject: losses
            for subject, losses in zip(subjects, found, strict=True)
            if len(losses) == last
        }

    def _run(self, subject: str, seed: int) -> Losses:
        course, losses = self._course, Losses()
        worker = Worker(TARGET, {} if CUDA else {"TRITON_INTERPRET": "1"})
        failure = ""
        data = {"batch": course.batch, "size": course.size, "images": course.images}
        try:
            self._ask(worker, "build", subject=subject, seed=seed, space=course.space, **data)
            while len(losses) < course.late[1]:
                steps = min(course.at_once, course.late[1] - len(losses))
                losses += self._ask(worker, "run", steps=steps)
                self._add(subject, seed, losses)
        except WorkerFailed as error:
            failure = str(error)
            self._add(subject, seed, losses, failure=failure)
        finally:
            worker.end()
        told = failure or f"{losses[0]:.4f} to {losses[-1]:.4f}"
        print(f"{subject:<13} seed {seed}: {told}", flush=True)
        return losses

    def _ask(self, worker: Worker, call: str, **arguments: Any) -> Any:
        return worker.ask(call, self._deadline.left, **arguments)

    def _add(self, subject: str, seed: int, losses: Losses, **more: Any) -> None:
        with self._lock:
            self._rows.add({"subject": subject, "seed": seed, "losses": list(losses), **more})


def judge(
    ours: Mapping[int, Losses], references: Mapping[int, Losses], course: Course
) -> dict[str, Any]:
    """How far ours are from the references of the same seeds, and whether that is right."""
    late_means, reference_late_means = (
        [fmean(losses[slice(*course.late)]) for losses in runs.values()]
        for runs in (ours, references)
    )
    differences = [
        abs(a / b - 1)
        for seed, losses in ours.items()
        for a, b in zip(losses[: course.early], references[seed][: course.early], strict=True)
    ]
    # Comparisons with NaN are false, but max may skip it.
    early = all(difference <= TOLERANCE for difference in differences)
    late = fmean(late_means)
    return {
        "early_difference": max(differences),
        "late_means": late_means,
        "late_mean": late,
        "reference_late_means": reference_late_means,
        "right": early and min(reference_late_means) <= late <= max(reference_late_means),
    }


def main() -> None:
    options = _options()
    require_gpu(options.dry)
    course = DRY if options.dry else _course(options)
    origin = provenance(options.commit) | {"course": asdict(course)}
    rows = Rows(options.out, origin, lambda row: (row["subject"], row["seed"]))
    trajectories = Trajectories(course, rows, Deadline(options.seconds))
    found = trajectories.run([(REFERENCE, seed) for seed in options.seeds])
    references = {seed: losses for (_, seed), losses in found.items()}
    if len(references) < len(options.seeds):
        raise SystemExit("without all references there is nothing to compare with")
    subjects = (*options.ours, NUDGED)
    found = trajectories.run([(name, seed) for name in subjects for seed in options.seeds])
    wrong = []
    for name in subjects:
        ours = {seed: losses for (subject, seed), losses in found.items() if subject == name}
        right = len(ours) == len(options.seeds)
        if right:
            verdict = judge(ours, references, course)
            rows.add({"subject": name, "seed": "all", **verdict})
            print(_told(name, verdict, course))
            right = verdict["right"]
        wrong += [] if right or name == NUDGED else [name]
    if wrong:
        raise SystemExit(f"not as the reference: {', '.join(wrong)}")


def _told(name: str, verdict: Mapping[str, Any], course: Course) -> str:
    means = verdict["reference_late_means"]
    verdict_text = "within" if verdict["right"] else "beyond"
    return (
        f"{name:<16} first {course.early} steps within {verdict['early_difference']:.2e}; "
        f"mean of steps {course.late[0]} to {course.late[1]} {verdict['late_mean']:.4f}, "
        f"reference {min(means):.4f} to {max(means):.4f}: {verdict_text}"
    )


def _course(options: argparse.Namespace) -> Course:
    space = {"widths": options.widths}
    return Course(
        space, options.batch, options.size, options.images, early=20, late=(150, 200), at_once=10
    )


def _options() -> argparse.Namespace:
    options = parser("losses of a search with the kernels against the reference's")
    options.add_argument("--ours", choices=OURS, nargs="+", help="default: all that run here")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of all")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--size", type=image_size, default=image_size("128x256"))
    options.add_argument("--images", type=int, default=256, help="built-in scenes")
    options.add_argument("--widths", type=int, nargs=3, default=[16, 32, 64])
    options.add_argument("--dry", action="store_true", help="a few tiny steps, also on the CPU")
    found = options.parse_args()
    found.ours = found.ours or (OURS if CUDA else OURS[:1])
    return found


if __name__ == "__main__":
    main()

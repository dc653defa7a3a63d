"""Steps of ours and of every stock subject in turn: two worker processes at a time.

Ours stays; the stock subjects come and go, each with a time limit for what it does before its
first step at full speed. Every pair is measured in the same rounds, in an order that is swapped
from round to round, and its result is on disk before the next one begins.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.options import Deadline
from bench.process import WorkerFailed, Workers
from bench.results_file import Rows
from bench.rounds import alternate, median, ratios, tenth_percentile
from bench.training.case import TrainingCase
from lgcnet_fast.train.run import WORKSPACE, WORKSPACE_VARIABLE

TARGET = "bench.training.server:TrainingServer"
AS_A_RUN = {WORKSPACE_VARIABLE: WORKSPACE}
"""Environment of ours."""
ANSWER_SECONDS = 120
"""For anything but building."""


@dataclass(frozen=True)
class Plan:
    stage: str
    ours: str
    stock: Sequence[str]
    rounds: int
    steps: int
    """A round, back to back."""
    build_seconds: float
    """After which a subject is given up."""
    compile_jobs: int = 1
    """Processes among which the modules of a compiled subject are shared out beforehand."""


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    return row["stage"], row["case"], row["subject"], row.get("beside", "")


@contextmanager
def empty_caches() -> Iterator[dict[str, str]]:
    """Environment of a process that finds nothing compiled by earlier ones."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")
        yield {name: str(Path(folder) / name.lower()) for name in names}


class Comparison:
    """Of one plan, with the results file and the time that there is."""

    def __init__(self, plan: Plan, rows: Rows, deadline: Deadline) -> None:
        self._plan, self._rows, self._deadline = plan, rows, deadline

    def first_steps(self, case: TrainingCase) -> None:
        """Time from the start of a process to full speed: with empty caches, then as left."""
        subject = self._plan.ours
        with empty_caches() as environment:
            for name in ("cold", "warm"):
                with Workers(TARGET, {**environment, **AS_A_RUN}) as ours:
                    built = self._build(ours, subject, case, started=ours.started)
                self._add(case, f"{subject} {name}", **built)
                print(f"{case} {subject} {name}: {_told(built)}", flush=True)

    def run(self, cases: Sequence[TrainingCase]) -> None:
        """The gate; then every stock subject beside ours on all cases before the next one."""
        with Workers(TARGET, AS_A_RUN) as ours:
            try:
                for case in cases:
                    self._require_right(ours, case)
                if not self._plan.stock:
                    self._alone(ours, cases)
            except WorkerFailed as error:
                raise SystemExit(f"{self._plan.ours}: {error}") from None
            for subject in self._plan.stock:
                if subject.startswith("compiled") and self._plan.compile_jobs > 1:
                    self._fill_cache(subject, cases)
                with Workers(TARGET) as other:
                    for case in cases:
                        if self._deadline.over:
                            print(f"out of time: {subject} on {case} and what follows left out")
                            return
                        try:
                            self._pair(ours, other, subject, case)
                        except WorkerFailed as error:
                            self._add(case, subject, failed=str(error))
                            print(f"{case}: {subject} failed: {error}", flush=True)

    def _fill_cache(self, subject: str, cases: Sequence[TrainingCase]) -> None:
        """torch.compile works on one module after the other; processes can do so beside others."""
        jobs, within = self._plan.compile_jobs, min(self._plan.build_seconds, self._deadline.left)

        def compile_part(part: int) -> None:
            with Workers(TARGET) as worker:
                for case in cases:
                    about = {"stage": self._plan.stage, "subject": subject, "case": asdict(case)}
                    try:
                        worker.ask("compile_part", within, **about, part=part, parts=jobs)
                    except WorkerFailed as error:
                        print(f"{case}: part {part} of {subject} not compiled: {error}", flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_part, range(jobs)))

    def _require_right(self, ours: Workers, case: TrainingCase) -> None:
        subject, within = self._plan.ours, self._plan.build_seconds
        found = ours.ask(
            "check", within, stage=self._plan.stage, subject=subject, case=asdict(case)
        )
        self._add(case, f"{subject} gradients", **found)
        print(f"{case} {subject}: errors {_rounded(found['errors'])}", flush=True)
        if found["faults"]:
            raise SystemExit(f"WRONG RESULT: {subject} {case}: " + "; ".join(found["faults"]))

    def _alone(self, ours: Workers, cases: Sequence[TrainingCase]) -> None:
        plan = self._plan
        for case in cases:
            built = self._build(ours, plan.ours, case)
            ms = median([self._round(ours) for _ in range(plan.rounds)])
            self._add(case, plan.ours, ms=ms, **built)
            print(f"{case} {plan.ours}: {ms:.2f} ms, {_told(built)}", flush=True)

    def _pair(self, ours: Workers, other: Workers, subject: str, case: TrainingCase) -> None:
        plan, mine = self._plan, self._plan.ours
        workers = {subject: other, mine: ours}
        built = {name: self._build(process, name, case) for name, process in workers.items()}
        times = alternate(
            {name: partial(self._round, process) for name, process in workers.items()}, plan.rounds
        )
        ms, ours_ms = median(times[subject]), median(times[mine])
        self._add(case, mine, beside=subject, ms=ours_ms, **built[mine])
        self._add(
            case,
            subject,
            ms=ms,
            ours=mine,
            ours_ms=ours_ms,
            speed_up=ms / ours_ms,
            speed_up_p10=tenth_percentile(ratios(times[subject], times[mine])),
            **built[subject],
        )
        print(
            f"{case}: {subject} {ms:.2f} ms ({_told(built[subject])}), "
            f"{mine} {ours_ms:.2f} ms ({_told(built[mine])}), speed-up {ms / ours_ms:.2f}",
            flush=True,
        )

    def _round(self, process: Workers) -> float:
        ms: float = process.ask("measure", ANSWER_SECONDS, steps=self._plan.steps)
        return ms

    def _build(
        self, process: Workers, subject: str, case: TrainingCase, started: float | None = None
    ) -> dict[str, Any]:
        within = min(self._plan.build_seconds, self._deadline.left)
        about = {"stage": self._plan.stage, "subject": subject, "case": asdict(case)}
        return process.ask("build", within, **about, started=started)

    def _add(self, case: TrainingCase, subject: str, **found: Any) -> None:
        about = {"stage": self._plan.stage, "case": str(case), "subject": subject}
        self._rows.add({**about, **asdict(case), **found})


def _told(built: dict[str, Any]) -> str:
    return (
        f"peak {built['peak_gib']:.2f} GiB, reserved {built['reserved_gib']:.2f} GiB, "
        f"full speed after {built['first_full_speed_s']:.1f} s"
    )


def _rounded(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())

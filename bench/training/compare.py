"""Steps of ours and of every stock subject in turn: two worker processes at a time.

Ours stays; the stock subjects come and go, each with a time limit for what it does before its
first step at full speed. Every pair is measured in the same rounds, in an order that is swapped
from round to round, and its result is on disk before the next one begins.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.options import Deadline
from bench.process import Worker, WorkerFailed, worker
from bench.results_file import Rows
from bench.rounds import median, ratios, tenth_percentile
from bench.training.case import TrainingCase

TARGET = "bench.training.server:TrainingServer"
ANSWER_SECONDS = 120
"""For anything but building."""


@dataclass(frozen=True)
class Plan:
    stage: str
    ours: str
    stock: Sequence[str]
    rounds: int
    steps: int
    """A round."""
    build_seconds: float
    """After which a subject is given up."""


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    return row["stage"], row["case"], row["subject"], row.get("beside", "")


@contextmanager
def empty_caches() -> Iterator[dict[str, str]]:
    """Environment of a process that finds nothing compiled by earlier ones."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")
        yield {name: str(Path(folder) / name.lower()) for name in names}


def first_steps(plan: Plan, case: TrainingCase, rows: Rows, deadline: Deadline) -> None:
    """Time from the start of a process to full speed: with empty caches, then with those left."""
    with empty_caches() as environment:
        for name in ("cold", "warm"):
            with worker(TARGET, environment) as ours:
                built = _build(ours, plan, plan.ours, case, deadline, ours.started)
            row = {
                "stage": plan.stage,
                "case": str(case),
                "subject": f"{plan.ours} {name}",
                **built,
            }
            rows.add(row)
            print(f"{case} {plan.ours} {name}: {_told(built)}", flush=True)


def compare(plan: Plan, cases: Sequence[TrainingCase], rows: Rows, deadline: Deadline) -> None:
    """Every stock subject beside ours, on all cases before the next subject begins."""
    with worker(TARGET) as ours:
        right = [case for case in cases if _is_right(ours, plan, case, rows)]
        for case in right:
            if not plan.stock:
                _alone(ours, plan, case, rows, deadline)
        for subject in plan.stock:
            with worker(TARGET) as other:
                for case in right:
                    if deadline.over:
                        print(f"out of time: {subject} on {case} and what follows left out")
                        return
                    try:
                        _pair(ours, other, plan, subject, case, rows, deadline)
                    except WorkerFailed as error:
                        _give_up(plan, subject, case, str(error), rows)
                        if not other.alive:
                            break
            if not ours.alive:
                raise SystemExit(f"{plan.ours} ended")


def _is_right(ours: Worker, plan: Plan, case: TrainingCase, rows: Rows) -> bool:
    found = ours.ask(
        "check", plan.build_seconds, stage=plan.stage, subject=plan.ours, case=asdict(case)
    )
    row = {"stage": plan.stage, "case": str(case), "subject": f"{plan.ours} gradients", **found}
    rows.add(row)
    print(f"{case} {plan.ours}: errors {_rounded(found['errors'])}", flush=True)
    if found["faults"]:
        raise SystemExit(f"WRONG RESULT: {plan.ours} {case}: " + "; ".join(found["faults"]))
    return True


def _alone(ours: Worker, plan: Plan, case: TrainingCase, rows: Rows, deadline: Deadline) -> None:
    built = _build(ours, plan, plan.ours, case, deadline, None)
    milliseconds = ours.ask("measure", ANSWER_SECONDS, steps=plan.rounds * plan.steps)
    row = {"stage": plan.stage, "case": str(case), "subject": plan.ours, **asdict(case), **built}
    rows.add({**row, "ms": median(milliseconds)})
    print(f"{case} {plan.ours}: {median(milliseconds):.2f} ms, {_told(built)}", flush=True)


def _pair(
    ours: Worker,
    other: Worker,
    plan: Plan,
    subject: str,
    case: TrainingCase,
    rows: Rows,
    deadline: Deadline,
) -> None:
    workers = {subject: other, plan.ours: ours}
    built = {
        name: _build(process, plan, name, case, deadline, None) for name, process in workers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(plan.rounds):
        order = list(workers.items())
        for name, process in order if number % 2 else reversed(order):
            steps = process.ask("measure", ANSWER_SECONDS, steps=plan.steps)
            times[name].append(median(steps))
    mine, theirs = median(times[plan.ours]), median(times[subject])
    common = {"stage": plan.stage, "case": str(case), **asdict(case)}
    rows.add({**common, "subject": plan.ours, "beside": subject, "ms": mine, **built[plan.ours]})
    rows.add(
        {
            **common,
            "subject": subject,
            "ms": theirs,
            "ours_ms": mine,
            "ours": plan.ours,
            "speed_up": theirs / mine,
            "speed_up_p10": tenth_percentile(ratios(times[subject], times[plan.ours])),
            **built[subject],
        }
    )
    print(
        f"{case}: {subject} {theirs:.2f} ms ({_told(built[subject])}), {plan.ours} {mine:.2f} ms "
        f"({_told(built[plan.ours])}), speed-up {theirs / mine:.2f}",
        flush=True,
    )


def _build(
    process: Worker,
    plan: Plan,
    subject: str,
    case: TrainingCase,
    deadline: Deadline,
    started: float | None,
) -> dict[str, Any]:
    seconds = min(plan.build_seconds, deadline.left)
    arguments = {"stage": plan.stage, "subject": subject, "case": asdict(case)}
    return process.ask("build", seconds, **arguments, started=started)


def _give_up(plan: Plan, subject: str, case: TrainingCase, reason: str, rows: Rows) -> None:
    row = {"stage": plan.stage, "case": str(case), "subject": subject, "failed": reason}
    rows.add({**row, **asdict(case)})
    print(f"{case}: {subject} failed: {reason}", flush=True)


def _told(built: dict[str, Any]) -> str:
    return (
        f"peak {built['peak_gib']:.2f} GiB, reserved {built['reserved_gib']:.2f} GiB, "
        f"full speed after {built['first_full_speed_s']:.1f} s"
    )


def _rounded(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())

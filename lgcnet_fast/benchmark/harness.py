"""Every subject in every runtime that was asked for, timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.engines import engine_frame
from lgcnet_fast.benchmark.gate import Agreement, check_labels
from lgcnet_fast.benchmark.onnx import onnx_frame
from lgcnet_fast.benchmark.plain import PLAIN_RUNTIMES, TensorFrame, exact_float32, plain_frame
from lgcnet_fast.benchmark.subjects import Subject
from lgcnet_fast.errors import ConfigError, DeviceError, UserError
from lgcnet_fast.latency.hardware import Hardware, describe
from lgcnet_fast.latency.timing import FULL_PROTOCOL, Protocol, Timing, time_interleaved
from lgcnet_fast.ops import use_backend

RUNTIMES = (*PLAIN_RUNTIMES, "deploy")
ONNX_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Entry:
    """One subject in one runtime."""

    subject: Subject
    runtime: str
    layout: str
    """nchw or nhwc; empty where the runtime chooses."""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.subject.name, self.runtime, self.layout)))


@dataclass(frozen=True)
class Row:
    """A measured entry."""

    entry: Entry
    timing: Timing
    miou: float | None
    """Percent, where the subject's run was evaluated at this input size."""
    agreement: Agreement | None
    """Of engines with their plain network; none of what is not compared."""

    def as_json(self) -> dict[str, Any]:
        subject = self.entry.subject
        return {
            "subject": subject.name,
            "kind": subject.kind,
            "runtime": self.entry.runtime,
            "layout": self.entry.layout or None,
            "parameters": subject.parameters,
            "miou": self.miou,
            "agreement": asdict(self.agreement) if self.agreement else None,
            **asdict(self.timing),
        }


@dataclass(frozen=True)
class Benchmark:
    hardware: Hardware
    case: Case
    backend: str
    protocol: Protocol
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "hardware": asdict(self.hardware),
            "case": asdict(self.case),
            "backend": self.backend,
            "protocol": asdict(self.protocol),
            "tf32": False,
            "rows": [row.as_json() for row in self.rows],
        }


def entries(
    subjects: Sequence[Subject], runtimes: Sequence[str], layouts: Sequence[str]
) -> tuple[Entry, ...]:
    """Every combination that exists.

    Without runtimes: deploy for our networks, eager for other modules; ONNX files always run in
    onnxruntime. Raises `ConfigError` for an unknown runtime, one that a subject cannot run in, or
    a subject that is named twice.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise ConfigError(f"runtime {runtime!r}: must be one of {', '.join(RUNTIMES)}")
    found = tuple(entry for subject in subjects for entry in _of(subject, runtimes, layouts))
    names = [entry.name for entry in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name}: given more than once")
    return found


def _of(subject: Subject, runtimes: Sequence[str], layouts: Sequence[str]) -> Iterator[Entry]:
    if subject.kind == "onnx":
        yield Entry(subject, ONNX_RUNTIME, "")
        return
    for runtime in runtimes or ("deploy" if subject.blueprint else "eager",):
        if runtime != "deploy":
            yield from (Entry(subject, runtime, layout) for layout in layouts)
        elif subject.blueprint is None:
            raise ConfigError(
                f"{subject.name}: runtime 'deploy' takes networks of this project only; choose "
                f"among {', '.join(PLAIN_RUNTIMES)}"
            )
        else:
            yield Entry(subject, runtime, "")


def benchmark(
    chosen: Sequence[Entry],
    case: Case,
    device: torch.device,
    backend: str = "auto",
    protocol: Protocol | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Builds every entry, compares engines with their plain networks, then times all in turns.

    backend: of engines; a named one that cannot serve raises `BackendError`.
    """
    protocol = protocol or FULL_PROTOCOL
    with exact_float32(), use_backend(backend):
        frames: dict[str, TensorFrame] = {}
        agreements: dict[str, Agreement | None] = {}
        for entry in chosen:
            with _explained(entry, case, device):
                frames[entry.name], agreements[entry.name] = _prepared(entry, case, device, backend)
        timings = time_interleaved(frames, device, case.batch, protocol, progress)
        hardware = describe(device, next(iter(frames.values())))
    rows = tuple(
        Row(entry, timings[entry.name], _miou(entry.subject, case), agreements[entry.name])
        for entry in chosen
    )
    return Benchmark(hardware, case, backend, protocol, rows)


def _prepared(
    entry: Entry, case: Case, device: torch.device, backend: str
) -> tuple[TensorFrame, Agreement | None]:
    subject = entry.subject
    if subject.file is not None:
        return onnx_frame(subject.file, case, device), None
    assert subject.network is not None
    if entry.runtime != "deploy":
        return plain_frame(subject.network, case, device, entry.runtime, entry.layout), None
    assert subject.blueprint is not None
    frame = engine_frame(replace(subject.blueprint, size=case.size), case, device, backend)
    return frame, check_labels(frame(), subject.network, case, device, entry.name)


def _miou(subject: Subject, case: Case) -> float | None:
    return subject.miou if subject.size == case.size else None


@contextmanager
def _explained(entry: Entry, case: Case, device: torch.device) -> Iterator[None]:
    """Names the entry where memory ends, or where a network of the user's fails."""
    height, width = case.size
    images = f"{case.batch} images of {height}x{width} in {case.dtype}"
    try:
        yield
    except torch.OutOfMemoryError:
        raise DeviceError(
            f"{entry.name}: {images} do not fit in the memory of {device}; choose a smaller "
            "--batch or --size"
        ) from None
    except Exception as error:
        if isinstance(error, UserError) or entry.subject.blueprint is not None:
            raise
        lines = str(error).splitlines() or [""]
        raise ConfigError(
            f"{entry.name}: fails on {images}: {type(error).__name__}: {lines[0]}"
        ) from error

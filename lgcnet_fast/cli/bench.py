"""`lgcnet bench`: how fast networks are on this device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lgcnet_fast.cli.console import console
from lgcnet_fast.cli.counting import counting
from lgcnet_fast.cli.options import BackendName, DeviceName, DtypeName, parse_size
from lgcnet_fast.files import replacing

if TYPE_CHECKING:
    from lgcnet_fast.benchmark.harness import Benchmark
    from lgcnet_fast.benchmark.subjects import Subject

RUNTIMES = ("eager", "graph", "compile", "compile+graph", "deploy")
LAYOUTS = ("nchw", "nhwc")
COPIES = ("none", "in", "out", "both")
"""As in benchmark.harness, .plain and .case, which cannot be imported here without torch."""
PAPER_SIZE = (769, 1537)


def bench(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="SUBJECT...",
            help="Run folder, engine file, genotype (name or JSON file; random weights), PyTorch "
            "module as package.module:factory, or ONNX file.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for bench.json and accuracy_fps.png.")
    ],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height and width.  [default: the first run's or engine's, else 769x1537]",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a frame.")] = 1,
    dtype: DtypeName = "fp32",
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            metavar="|".join(RUNTIMES),
            autocompletion=lambda: list(RUNTIMES),
            help="Repeatable.  [default: deploy for our networks, eager for others]",
        ),
    ] = None,
    layouts: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            metavar="|".join(LAYOUTS),
            autocompletion=lambda: list(LAYOUTS),
            help="Of plain PyTorch; repeatable.  [default: both]",
        ),
    ] = None,
    backend: BackendName = "auto",
    upsample: Annotated[
        bool,
        typer.Option("--upsample/--logits", help="End with labels at full size, or with logits."),
    ] = True,
    copies: Annotated[
        str,
        typer.Option(
            metavar="|".join(COPIES),
            autocompletion=lambda: list(COPIES),
            help="Copies between host and GPU that count: images in, results out.",
        ),
    ] = "none",
    classes: Annotated[int, typer.Option(min=2, max=255, help="Of genotypes.")] = 19,
    device: DeviceName = "auto",
) -> None:
    """Time networks from uint8 image to label map, all in turns on the same images.

    In every round each subject runs frames back to back (FPS) and frames that are waited for one by
    one (latency); odd rounds take the opposite order. TF32 is off. A deployed engine is first
    compared with its network in plain PyTorch; a wrong one is refused.

    Examples:

        lgcnet bench runs/camvid --dtype fp16 --runtime deploy --runtime compile+graph --out bench

        lgcnet bench reference my_package.nets:bisenet model.onnx --size 512x1024 --out bench
    """
    sides = None if size is None else parse_size(size)
    from lgcnet_fast.benchmark.case import Case
    from lgcnet_fast.benchmark.harness import benchmark, entries
    from lgcnet_fast.benchmark.subjects import open_subject
    from lgcnet_fast.doctor import check_device

    target = check_device(device)
    opened = [open_subject(subject, classes) for subject in subjects]
    case = Case(sides or _own_size(opened), batch, dtype, upsample, copies)
    chosen = entries(opened, runtimes or (), layouts or LAYOUTS)
    with counting("bench") as progress:
        result = benchmark(chosen, case, target, backend, progress=progress)
    _write(result, out)
    _print(result, out)


def _own_size(subjects: list[Subject]) -> tuple[int, int]:
    return next((subject.size for subject in subjects if subject.size), PAPER_SIZE)


def _write(result: Benchmark, out: Path) -> None:
    from lgcnet_fast.report.accuracy_fps import MeasuredPoint, draw_accuracy_fps

    with replacing(out / "bench.json") as temporary:
        temporary.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    points = [MeasuredPoint(row.entry.name, row.timing.fps, row.miou) for row in result.rows]
    with replacing(out / "accuracy_fps.png") as temporary:
        draw_accuracy_fps(points, result.hardware.device, temporary)


def _print(result: Benchmark, out: Path) -> None:
    hardware, case = result.hardware, result.case
    versions = ", ".join(
        f"{name} {value}"
        for name, value in (
            ("driver", hardware.driver),
            ("torch", hardware.torch),
            ("CUDA", hardware.cuda),
        )
        if value
    )
    clocks = f"clocks: {hardware.clocks or hardware.clocks_unknown}"
    end = "labels" if case.upsample else "logits"
    height, width = case.size
    console().print(f"{hardware.device}: {versions}; {clocks}; CPU threads: {hardware.cpu_threads}")
    console().print(
        f"{case.batch} x {height}x{width} (height x width), {case.dtype}, uint8 images to {end}, "
        f"copies: {case.copies}"
    )
    console().print(_rows(result))
    console().print(f"written: {out / 'bench.json'}, {out / 'accuracy_fps.png'}")


def _rows(result: Benchmark) -> Table:
    shown = Table("subject", "runtime", "FPS", "+- %", "latency ms", "p99 ms", "host us", "mIoU %")
    for column in shown.columns[2:]:
        column.justify = "right"
    for row in sorted(result.rows, key=lambda row: -row.timing.fps):
        timing = row.timing
        shown.add_row(
            row.entry.subject.name,
            f"{row.entry.runtime} {row.entry.layout}".strip(),
            f"{timing.fps:.1f}",
            f"{100 * timing.fps_spread:.1f}",
            f"{timing.latency_ms:.3f}",
            f"{timing.latency_p99_ms:.3f}",
            "-" if timing.host_us is None else f"{timing.host_us:.0f}",
            "-" if row.miou is None else f"{row.miou:.1f}",
        )
    return shown

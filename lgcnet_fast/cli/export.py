"""`lgcnet export`: a trained run as a file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lgcnet_fast.cli.options import RunFolder, parse_size

if TYPE_CHECKING:
    from lgcnet_fast.deploy.export import Exported

FORMATS = ("onnx", "torchscript", "pt2", "tensorrt")
"""As deploy.export.FORMATS, which cannot be imported here without torch."""


def export(
    folder: RunFolder,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            autocompletion=lambda: list(FORMATS),
            help="Runtime that the file is for.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Height and width.  [default: the run's evaluate.size]"),
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Take images of any size, not only of --size.")
    ] = False,
    argmax: Annotated[
        bool,
        typer.Option("--argmax", help="Return labels at the image's size instead of logits."),
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 or later.")] = 18,
    fp16: Annotated[bool, typer.Option("--fp16", help="TensorRT: half precision.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="TensorRT: 8 bits, calibrated on the run's val images.")
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TensorRT: cache that makes the next build short."),
    ] = None,
) -> None:
    """Write a trained run as ONNX, TorchScript, torch.export or TensorRT file.

    The file takes RGB images as they are, uint8 (1, H, W, 3). It is compared with the network, on
    random images and on some of the run's own, before it is kept.

    Examples:

        lgcnet export runs/camvid --format onnx --out camvid.onnx --argmax

        lgcnet export runs/camvid --format onnx --out camvid.onnx --size 720x960 --dynamic

        lgcnet export runs/camvid --format tensorrt --out camvid.engine --fp16
    """
    sides = None if size is None else parse_size(size)
    from lgcnet_fast.deploy.export import ExportOptions
    from lgcnet_fast.deploy.export import export as write
    from lgcnet_fast.deploy.export_tensorrt import EngineOptions
    from lgcnet_fast.deploy.run_folder import read_trained_run

    engine = EngineOptions(fp16, int8, timing_cache)
    options = ExportOptions(form, sides, dynamic, argmax, opset, engine)
    _report(write(read_trained_run(folder), out, options), options.engine.int8)


def _report(exported: Exported, int8: bool) -> None:
    agreement = exported.agreement
    sizes = ", ".join(f"{height}x{width}" for height, width in agreement.sizes)
    typer.echo(f"{exported.path}: written")
    typer.echo(
        f"checked on {agreement.random} random and {agreement.real} real images ({sizes}): largest "
        f"difference {agreement.difference:.2g}, allowed {agreement.allowed:.2g}"
    )
    if exported.no_real_images:
        typer.echo(f"no real images: {exported.no_real_images}")
    if exported.engine is not None:
        typer.echo(f"{exported.engine}: written; the check above is that of its ONNX model")
    if exported.no_engine:
        typer.echo(f"no engine was built: {exported.no_engine}")
        typer.echo(f"this builds it where TensorRT is installed:\n\n  {exported.trtexec}\n")
        if int8:
            typer.echo("trtexec does not calibrate --int8: the engine tells speed, not accuracy")

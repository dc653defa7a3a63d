"""`lgcnet predict`: a trained run on new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lgcnet_fast.cli.counting import counting
from lgcnet_fast.cli.options import DTYPES, BackendName, RunFolder

FORMATS = ("pictures", "cityscapes")
"""As train.predict.FORMATS, which cannot be imported here without torch."""


def predict(
    folder: RunFolder,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Image, folder or video.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            autocompletion=lambda: list(FORMATS),
            help="pictures: labels, overlay, side by side; cityscapes: ids for its test server.",
        ),
    ] = "pictures",
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda:N", help="[default: the run's]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            autocompletion=lambda: list(DTYPES),
            help="Numbers that the network computes with.  [default: the run's precision]",
        ),
    ] = None,
    backend: BackendName = "auto",
) -> None:
    """Segment an image, all images below a folder, or a video with a trained run.

    Examples:

        lgcnet predict runs/camvid street.jpg --out pictures

        lgcnet predict runs/city/seed-0 leftImg8bit/test --out upload --format cityscapes
    """
    from lgcnet_fast.cli.folders import read_run
    from lgcnet_fast.train.predict import predict as predict_all
    from lgcnet_fast.train.predictor import Predictor

    predictor = Predictor.open(read_run(folder, device, backend), dtype)
    with counting("predict") as progress:
        done = predict_all(predictor, source, out, form, progress)
    typer.echo(f"{done} predicted: {out}")

"""`lgcnet export`: a trained run as one file of another runtime, checked before it is kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lgcnet_fast.config import Size
from lgcnet_fast.deploy import export_onnx, export_tensorrt, export_torch
from lgcnet_fast.deploy.export_check import (
    LARGEST,
    SMALLEST,
    Agreement,
    Runner,
    check,
    check_sizes,
    real_images,
)
from lgcnet_fast.deploy.export_program import ExportProgram
from lgcnet_fast.deploy.export_tensorrt import EngineOptions
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.run_folder import TrainedRun
from lgcnet_fast.errors import ConfigError, UserError
from lgcnet_fast.files import replacing
from lgcnet_fast.ops import use_backend

FORMATS = ("onnx", "torchscript", "pt2", "tensorrt")
REAL_IMAGES = 4
CALIBRATION_IMAGES = 64

_TRACED_SIZE: Size = (97, 161)
"""Of the image that dynamic programs are traced with; which one does not matter."""


@dataclass(frozen=True)
class ExportOptions:
    form: str
    """One of `FORMATS`."""
    size: Size | None = None
    """(height, width) of the images; by default that of the run's evaluation."""
    dynamic: bool = False
    """Images of any size from 32 to 16384 pixels a side; `size` is what is checked around."""
    labels: bool = False
    """End with upsampling to the image's size and argmax."""
    opset: int = export_onnx.OLDEST_OPSET
    engine: EngineOptions = EngineOptions()
    """Of TensorRT only."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    size: Size
    agreement: Agreement
    no_real_images: str
    """Why the check had no real images; empty if it had."""
    engine: Path | None = None
    """The TensorRT engine that was built from `path`."""
    no_engine: str = ""
    """Why no TensorRT engine was built; empty if one was, or none was wanted."""
    trtexec: str = ""
    """The command that builds the engine that was not built here."""


@use_backend("reference")
def export(run: TrainedRun, out: Path, options: ExportOptions) -> Exported:
    """Writes `out` if the exported program agrees with the network, else nothing.

    Traces the plain forms of operations, whatever the backend: other runtimes know no others.

    For TensorRT the ONNX model is written beside it, and checked. Raises `ConfigError` for options
    that cannot work, `UserError` where a package is missing, `ExportError` where runtime and
    network disagree.
    """
    size = _image_size(run, options)
    _check_options(out, options)
    model = out.with_suffix(".onnx") if options.form == "tensorrt" else out
    program = ExportProgram(fold(run.network), options.labels, options.dynamic).eval()
    sizes = check_sizes(size, options.dynamic)
    images, complaint = real_images(run.config.data, sizes, REAL_IMAGES)
    write, load = _format(options)
    example = torch.zeros(1, *(_TRACED_SIZE if options.dynamic else size), 3, dtype=torch.uint8)
    with replacing(model) as temporary:
        write(program, example, temporary)
        agreement = check(run.network, load(temporary), sizes, images, options.labels)
    exported = Exported(model, size, agreement, complaint)
    return _with_engine(run, exported, out, options) if options.form == "tensorrt" else exported


def _with_engine(run: TrainedRun, model: Exported, out: Path, options: ExportOptions) -> Exported:
    """Builds the engine `out`, or says what builds it elsewhere."""
    size, dynamic, engine = model.size, options.dynamic, options.engine
    missing = export_tensorrt.missing_to_build()
    if missing:
        command = export_tensorrt.trtexec_command(model.path, out, size, dynamic, engine)
        return replace(model, no_engine=missing, trtexec=command)
    images: list[Tensor] = []
    if engine.int8:
        images, _ = real_images(run.config.data, [size], CALIBRATION_IMAGES)
    built = export_tensorrt.build_engine(model.path, size, dynamic, engine, images)
    with replacing(out) as temporary:
        temporary.write_bytes(built)
    return replace(model, engine=out)


def _format(
    options: ExportOptions,
) -> tuple[Callable[[ExportProgram, Tensor, Path], None], Callable[[Path], Runner]]:
    """How to write the format, and how to load it for the check."""
    dynamic, opset = options.dynamic, options.opset
    if options.form == "torchscript":
        return export_torch.write_torchscript, export_torch.open_torchscript
    if options.form == "pt2":
        return (
            lambda program, example, path: export_torch.write_pt2(program, example, dynamic, path),
            export_torch.open_pt2,
        )
    return (
        lambda program, example, path: export_onnx.write_onnx(
            program, example, dynamic, opset, path
        ),
        export_onnx.open_onnx,
    )


def _image_size(run: TrainedRun, options: ExportOptions) -> Size:
    size = options.size or run.config.evaluate.size
    if size is None:
        raise ConfigError(
            "this run evaluates images at their own size, so the export needs one: give --size HxW"
        )
    if not all(SMALLEST <= side <= LARGEST for side in size):
        raise ConfigError(
            f"--size {size[0]}x{size[1]}: each side must have {SMALLEST} to {LARGEST} pixels"
        )
    return size


def _check_options(out: Path, options: ExportOptions) -> None:
    form = options.form
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: must be one of {', '.join(FORMATS)}")
    if form in ("onnx", "tensorrt"):
        _require(export_onnx.PACKAGES, f"--format {form}")
        export_onnx.check_opset(options.opset)
    elif options.opset != export_onnx.OLDEST_OPSET:
        raise ConfigError(f"--opset is for ONNX; --format {form} has none")
    if form != "tensorrt" and options.engine != EngineOptions():
        raise ConfigError("--fp16, --int8 and --timing-cache need --format tensorrt")
    if form == "tensorrt" and out.suffix == ".onnx":
        raise ConfigError(f"--out {out}: names the engine; the ONNX model is put beside it")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file in it")


def _require(packages: tuple[str, ...], purpose: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}: pip install 'lgcnet_fast[export]'")

"""Exports that torch itself runs: torch.export programs (pt2) and TorchScript."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lgcnet_fast.deploy.export_check import LARGEST, SMALLEST, Runner
from lgcnet_fast.deploy.export_program import INPUT, ExportProgram


def write_pt2(program: ExportProgram, example: Tensor, dynamic: bool, path: Path) -> None:
    """Read it with `torch.export.load(path).module()`; `torch.export.passes.move_to_device_pass`
    brings it to a GPU."""
    with quiet(), path.open("wb") as file:
        torch.export.save(trace(program, example, dynamic), file)


def open_pt2(path: Path) -> Runner:
    with quiet(), path.open("rb") as file:
        return torch.export.load(file).module()


def write_torchscript(program: ExportProgram, example: Tensor, path: Path) -> None:
    """Read it with `torch.jit.load(path)`. What was traced takes images of every size if
    `program` is dynamic."""
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(program, example, check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), str(path))


def open_torchscript(path: Path) -> Runner:
    with quiet():
        return torch.jit.load(str(path), map_location="cpu")


def trace(program: ExportProgram, example: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """With `dynamic` for all sizes from `SMALLEST` to `LARGEST`, else for that of `example`."""
    shapes = None
    if dynamic:
        sides = {
            axis: torch.export.Dim(name, min=SMALLEST, max=LARGEST)
            for axis, name in dynamic_axes().items()
        }
        shapes = {INPUT: sides}
    return torch.export.export(program, (example,), dynamic_shapes=shapes, strict=False)


def dynamic_axes() -> dict[int, str]:
    """Axes of the input that vary, and their names."""
    return {1: "height", 2: "width"}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters say about themselves: deprecations, packages not needed here."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

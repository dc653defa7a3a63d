"""Export to ONNX: one file, standard operations only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lgcnet_fast.deploy.export_check import Runner
from lgcnet_fast.deploy.export_program import INPUT, ExportProgram
from lgcnet_fast.deploy.export_torch import dynamic_axes, quiet, trace
from lgcnet_fast.errors import ConfigError, ExportError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST_OPSET = 18
"""The first that torch writes; before it, Resize means something else."""


def check_opset(opset: int) -> None:
    """Raises `ConfigError` for one that is too old, or too new for the onnx package here."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ConfigError(
            f"--opset {opset}: give {OLDEST_OPSET} to {newest}, which the installed onnx "
            f"{onnx.__version__} knows"
        )


def write_onnx(
    program: ExportProgram, example: Tensor, dynamic: bool, opset: int, path: Path
) -> None:
    """Raises `ExportError` if the model needs another opset or is not standard ONNX."""
    with quiet():
        exported = torch.onnx.export(
            trace(program, example, dynamic),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[program.output],
            opset_version=opset,
            # Here only names of the axes that vary; the range is in the trace.
            dynamic_shapes={INPUT: dynamic_axes()} if dynamic else None,
        )
        assert exported is not None  # It is, unless torch is given a path.
        exported.save(path, external_data=False)
    _check_model(path, opset)


def open_onnx(path: Path) -> Runner:
    """In onnxruntime on the CPU. Raises `ExportError` if it cannot load the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    # It has an exception class of its own for each kind of failure.
    except Exception as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load the exported model: {error}; "
            f"try --opset {OLDEST_OPSET}"
        ) from None
    return lambda image: torch.from_numpy(session.run(None, {INPUT: image.numpy()})[0])


def _check_model(path: Path, opset: int) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found.get("") != opset:
        raise ExportError(
            f"torch {torch.__version__} could not express this network in opset {opset}; use "
            f"--opset {found.get('', OLDEST_OPSET)}"
        )
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign or model.functions:
        raise ExportError(f"the model has operations that are not standard: {sorted(foreign)}")

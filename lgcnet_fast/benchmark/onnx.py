"""Frames of ONNX files in onnxruntime, an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.plain import Normalisation, TensorFrame, upsampled_labels, with_copies
from lgcnet_fast.errors import ConfigError, DeviceError, ExportError

if TYPE_CHECKING:
    import onnxruntime

EXTRA = "pip install 'lgcnet_fast[export]'"
IMAGE = "tensor(uint8)"
FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
Runner = Callable[[Tensor], Tensor]


def onnx_frame(path: Path, case: Case, device: torch.device) -> TensorFrame:
    """A frame of an ONNX model with one input and labels or logits as its first output.

    The input is images uint8 (N, H, W, 3), as `lgcnet export` writes it, or normalised images
    (N, 3, H, W) in float32 or float16, which plain PyTorch then normalises; it also takes logits to
    labels. The file decides the numeric type, not the case. Raises `ExportError` for a file that
    onnxruntime cannot load, `ConfigError` for one that does not fit the case, `DeviceError` where
    onnxruntime has no support for the device.
    """
    case.check_device(device)
    session = _open(path, device)
    given = _only_input(session, path)
    _check_shape(given, case, path)
    run = _bound(session, device) if device.type == "cuda" else _on_host(session)
    images = case.images(device)
    normalise = Normalisation().to(device)

    @torch.inference_mode()
    def frame() -> Tensor:
        if given.type == IMAGE:
            output = run(images)
        else:
            output = run(normalise(images).to(FLOATS[given.type]).contiguous())
        ends_with_logits = output.dim() == 4 and case.upsample
        return upsampled_labels(output, case.size) if ends_with_logits else output

    _check_output(frame(), case, path)
    return with_copies(frame, images, case)


def _open(path: Path, device: torch.device) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(f"{path}: ONNX files need onnxruntime: {EXTRA}") from None
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"{path}: the installed onnxruntime has no {provider}; install onnxruntime-gpu, or "
            "measure on the CPU"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    where = {"device_id": device.index or 0} if device.type == "cuda" else {}
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[(provider, where)])
    # It has an exception class of its own for each kind of failure.
    except Exception as error:
        first = str(error).splitlines()[0]
        raise ExportError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {first}"
        ) from None


def _only_input(session: onnxruntime.InferenceSession, path: Path) -> Any:
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in (IMAGE, *FLOATS) or len(inputs[0].shape) != 4:
        found = ", ".join(f"{each.name}: {each.type} {each.shape}" for each in inputs)
        raise ConfigError(
            f"{path}: takes {found}; one input is needed, images uint8 (N, H, W, 3) or normalised "
            "images (N, 3, H, W)"
        )
    return inputs[0]


def _check_shape(given: Any, case: Case, path: Path) -> None:
    """Fixed sides of the input must be those of the case; named ones take any."""
    channels_last = given.type == IMAGE
    wanted = (case.batch, *case.size, 3) if channels_last else (case.batch, 3, *case.size)
    pairs = zip(given.shape, wanted, strict=True)
    if any(isinstance(side, int) and side != ours for side, ours in pairs):
        raise ConfigError(
            f"{path}: takes inputs {_shape(given.shape)}, the benchmark has {_shape(wanted)}; "
            "choose that size and batch, or export the file with --dynamic"
        )


def _check_output(output: Tensor, case: Case, path: Path) -> None:
    if output.dim() not in (3, 4):
        raise ConfigError(
            f"{path}: its first output has shape {tuple(output.shape)}; labels (N, H, W) or logits "
            "(N, classes, h, w) are needed"
        )
    if output.dim() == 3 and not case.upsample:
        raise ConfigError(
            f"{path}: returns labels, so it cannot be measured without the upsampling; export it "
            "without --argmax"
        )


def _shape(sides: Sequence[object]) -> str:
    return f"({', '.join(str(side) for side in sides)})"


def _on_host(session: onnxruntime.InferenceSession) -> Runner:
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _bound(session: onnxruntime.InferenceSession, device: torch.device) -> Runner:
    """Input and output stay in torch's memory on the GPU."""
    name, output_name = session.get_inputs()[0].name, session.get_outputs()[0].name
    index = device.index or 0
    output: Tensor | None = None

    def run(x: Tensor) -> Tensor:
        nonlocal output
        if output is None:
            # A run through the host's memory tells the output's shape.
            example = session.run([output_name], {name: x.cpu().numpy()})[0]
            output = torch.from_numpy(example).to(device)
        binding = session.io_binding()
        binding.bind_input(name, "cuda", index, _numpy_dtype(x), tuple(x.shape), x.data_ptr())
        binding.bind_output(
            output_name, "cuda", index, _numpy_dtype(output), tuple(output.shape), output.data_ptr()
        )
        # onnxruntime has a stream of its own: the input must be ready, and the output is.
        torch.cuda.current_stream(device).synchronize()
        session.run_with_iobinding(binding)
        return output

    return run


def _numpy_dtype(tensor: Tensor) -> np.dtype[Any]:
    return np.dtype(str(tensor.dtype).removeprefix("torch."))

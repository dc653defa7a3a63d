"""TensorRT engines from exported ONNX models, or the trtexec command that builds them elsewhere."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.config import Size
from lgcnet_fast.deploy.export_check import LARGEST, SMALLEST
from lgcnet_fast.deploy.export_program import INPUT
from lgcnet_fast.errors import ExportError

MAJOR = 10
"""TensorRT version whose interface is used here."""


@dataclass(frozen=True)
class EngineOptions:
    fp16: bool = False
    int8: bool = False
    timing_cache: Path | None = None
    """Read if it exists, written after the build; makes the next build on this device short."""


def missing_to_build() -> str:
    """Why no engine can be built on this machine; empty if it can."""
    if importlib.util.find_spec("tensorrt") is None:
        return "the package tensorrt is not installed (pip install 'lgcnet_fast[tensorrt]')"
    import tensorrt

    if int(tensorrt.__version__.split(".")[0]) != MAJOR:
        return f"engines are built with TensorRT {MAJOR}, not {tensorrt.__version__}"
    if not torch.cuda.is_available():
        return "engines are built on the GPU that they run on, and there is none here"
    return ""


def image_shapes(size: Size, dynamic: bool) -> tuple[tuple[int, ...], ...]:
    """Smallest, usual and largest input: from half to twice `size` if `dynamic`."""
    usual = (1, *size, 3)
    if not dynamic:
        return usual, usual, usual
    smallest = (1, *(max(SMALLEST, side // 2) for side in size), 3)
    return smallest, usual, (1, *(min(LARGEST, side * 2) for side in size), 3)


def trtexec_command(
    model: Path, engine: Path, size: Size, dynamic: bool, options: EngineOptions
) -> str:
    """Builds `engine` from `model`, to be pasted into a shell."""
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={engine}"]
    if dynamic:
        named = zip(("min", "opt", "max"), image_shapes(size, dynamic), strict=True)
        words += [f"--{name}Shapes={INPUT}:{'x'.join(map(str, shape))}" for name, shape in named]
    words += ["--fp16"] if options.fp16 else []
    words += ["--int8"] if options.int8 else []
    words += [f"--timingCacheFile={options.timing_cache}"] if options.timing_cache else []
    return shlex.join(words)


def build_engine(
    model: Path, size: Size, dynamic: bool, options: EngineOptions, images: Sequence[Tensor]
) -> bytes:
    """The serialised engine, for the GPU, driver and TensorRT of this machine.

    images: RGB uint8 (1, *size, 3) that INT8 is calibrated on. Raises `ExportError` if TensorRT
    refuses the model or there are no images to calibrate on.
    """
    import tensorrt as trt

    if options.int8 and not images:
        raise ExportError("--int8 is calibrated on images of the run's data, which is not there")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.read_bytes()):
        faults = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f"{model}: refused by TensorRT {trt.__version__}: {faults}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *image_shapes(size, dynamic))
    config.add_optimization_profile(profile)
    if options.fp16:
        config.set_flag(trt.BuilderFlag.FP16)
    if options.int8:
        config.set_flag(trt.BuilderFlag.INT8)
        config.int8_calibrator = _calibrator(trt, images)
        config.set_calibration_profile(profile)
    _use_timing_cache(config, options.timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{model}: TensorRT {trt.__version__} could not build an engine")
    if options.timing_cache is not None:
        options.timing_cache.write_bytes(config.get_timing_cache().serialize())
    return bytes(engine)


def _use_timing_cache(config: Any, path: Path | None) -> None:
    if path is None:
        return
    stored = path.read_bytes() if path.exists() else b""
    if not config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False):
        raise ExportError(f"{path}: timing cache of another device or version; name another file")


def _calibrator(trt: Any, images: Sequence[Tensor]) -> Any:
    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc, name-defined]
        """Hands over one image after the other."""

        def __init__(self) -> None:
            super().__init__()
            self.waiting = iter(images)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            image = next(self.waiting, None)
            if image is None:
                return None
            # Kept until the next call: TensorRT reads from the address.
            self.current = image.cuda().contiguous()
            return [self.current.data_ptr()]

        def read_calibration_cache(self) -> None:
            return None

        def write_calibration_cache(self, cache: Any) -> None:
            return None

    return Calibrator()

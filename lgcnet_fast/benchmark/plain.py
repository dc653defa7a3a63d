"""Networks in plain PyTorch, the way a careful user runs them: the stock to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.config import Size
from lgcnet_fast.data.normalise import DEVIATION, MEAN
from lgcnet_fast.errors import ConfigError, DeviceError
from lgcnet_fast.ops import use_backend
from lgcnet_fast.recording import recording

LAYOUTS = ("nchw", "nhwc")
PLAIN_RUNTIMES = ("eager", "graph", "compile", "compile+graph")
CAPTURE_WARM_UP = 3
"""Runs before a capture: libraries choose their algorithms and allocate."""

TensorFrame = Callable[[], Tensor]
"""Runs one batch; returns labels or logits, in memory that the next frame may overwrite.

Whoever reads a result that lies on the host waits for the device first.
"""


class Normalisation(nn.Module):
    """uint8 images (N, H, W, 3) to normalised float32 (N, 3, H, W), strides as they are."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        deviation = 255 * torch.tensor(DEVIATION).view(1, 3, 1, 1)
        mean = 255 * torch.tensor(MEAN).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / deviation, persistent=False)
        self.register_buffer("shift", -mean / deviation, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale)


class Pipeline(nn.Module):
    """uint8 images (N, H, W, 3) to uint8 labels (N, H, W), or to the network's logits.

    network: takes normalised images (N, 3, H, W) and returns logits (N, classes, h, w), alone or
    first in a list, tuple or mapping (as networks with auxiliary heads do). Images are normalised
    in float32, logits upsampled in the network's dtype.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, layout: str, upsample: bool) -> None:
        super().__init__()
        self.dtype = dtype
        self.memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        self.upsample = upsample
        self.normalisation = Normalisation()
        self.network = network.eval().to(dtype=dtype, memory_format=self.memory_format)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalisation(images).to(self.dtype, memory_format=self.memory_format)
        logits = first_tensor(self.network(x))
        if not self.upsample:
            return logits
        return upsampled_labels(logits, (images.shape[1], images.shape[2]))


def upsampled_labels(logits: Tensor, size: Size) -> Tensor:
    """uint8 (N, *size), upsampled in the dtype of the logits."""
    full = F.interpolate(logits, size, mode="bilinear", align_corners=True)
    return full.argmax(1).to(torch.uint8)


def first_tensor(output: object) -> Tensor:
    """The logits among what a network returns. Raises `ConfigError` if there are none."""
    while isinstance(output, list | tuple | Mapping) and output:
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    if not isinstance(output, Tensor) or output.dim() != 4:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise ConfigError(
            f"the network returned a {type(output).__name__}{shape}; needed are logits "
            "(N, classes, h, w), alone or first in a list, tuple or mapping"
        )
    return output


def plain_frame(
    network: nn.Module,
    case: Case,
    device: torch.device,
    runtime: str = "eager",
    layout: str = "nchw",
) -> TensorFrame:
    """A frame of a copy of `network` in plain PyTorch.

    runtime: eager; graph (CUDA graph); compile (torch.compile, max-autotune); compile+graph.
    Call it, and the frame, within `exact_float32`. Raises `ConfigError` for an unknown runtime or
    layout, `DeviceError` where the device has no CUDA graphs.
    """
    if runtime not in PLAIN_RUNTIMES:
        raise ConfigError(f"runtime {runtime!r}: must be one of {', '.join(PLAIN_RUNTIMES)}")
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    if "graph" in runtime and device.type != "cuda":
        raise DeviceError(f"runtime {runtime!r}: CUDA graphs need a GPU, this is {device}")
    case.check_device(device)
    pipeline = Pipeline(copy.deepcopy(network), case.torch_dtype, layout, case.upsample).to(device)
    run: Callable[[Tensor], Tensor] = pipeline
    if "compile" in runtime:
        run = torch.compile(pipeline, mode="max-autotune-no-cudagraphs", dynamic=False)
    images = case.images(device)
    frame = _inference(lambda: run(images))
    frame()
    if "graph" in runtime:
        frame = captured(frame, device)
    return with_copies(frame, images, case)


def _inference(frame: TensorFrame) -> TensorFrame:
    """Without gradients, and our own networks without our own kernels."""

    def run() -> Tensor:
        with use_backend("reference"), torch.inference_mode():
            return frame()

    return run


@dataclass(frozen=True)
class CapturedFrame:
    """A frame as one CUDA graph; its result stays in the same memory."""

    graph: torch.cuda.CUDAGraph
    result: Tensor
    frame: TensorFrame
    """Owns the weights and images that the graph reads where they were."""

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


def captured(frame: TensorFrame, device: torch.device) -> CapturedFrame:
    """Runs `frame` a few times, then records it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UP):
            frame()
    current.wait_stream(stream)
    with recording(graph, stream):
        result = frame()
    return CapturedFrame(graph, result, frame)


def with_copies(frame: TensorFrame, images: Tensor, case: Case) -> TensorFrame:
    """`frame` with the copies of the case: into `images`, which it reads, and of its result."""
    if case.copies == "none":
        return frame
    source = images.cpu().pin_memory()
    target: Tensor | None = None

    def run() -> Tensor:
        nonlocal target
        if case.copies != "out":
            images.copy_(source, non_blocking=True)
        result = frame()
        if case.copies == "in":
            return result
        if target is None:
            target = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        return target.copy_(result, non_blocking=True)

    return run


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, and cuDNN free to try its algorithms, for every subject alike."""
    backends = torch.backends
    before = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark)
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False
    backends.cudnn.benchmark = True
    try:
        yield
    finally:
        matmul, convolution, benchmark = before
        backends.cuda.matmul.allow_tf32 = cast(bool, matmul)
        backends.cudnn.allow_tf32 = cast(bool, convolution)
        backends.cudnn.benchmark = benchmark

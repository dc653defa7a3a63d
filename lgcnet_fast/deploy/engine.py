"""An engine: from uint8 images to uint8 label maps of the same size, on one device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy.argmax import argmax_labels
from lgcnet_fast.deploy.blueprint import Blueprint
from lgcnet_fast.deploy.frames import labels_of_frames
from lgcnet_fast.deploy.operations import Size
from lgcnet_fast.deploy.program import FoldedNetwork
from lgcnet_fast.deploy.replay import FusedEngine, GraphEngine
from lgcnet_fast.errors import ConfigError, DeviceError
from lgcnet_fast.ops.backend import Implementation, Operation, use_backend

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BF16_CAPABILITY = (8, 0)
"""The oldest GPUs that compute in bf16; older ones only emulate it."""


class Engine:
    """Threads may share it: the reference holds no state between images, the others a lock.

    dtype: fp32, fp16 or bf16, of the weights and maps; images are normalised and logits upsampled
    in float32. backend: `triton`, the fused plan as a CUDA graph; `cuda`, the CUDA kernels and
    cuDNN as one, for GPUs without Triton too; `reference`, plain PyTorch; or `auto`, the choice of
    the process (ops/backend.py), which takes what the tuning table of the GPU says. Raises
    `ConfigError` for another dtype, `DeviceError` where the device lacks it, `BackendError` where a
    named backend cannot serve.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        device: torch.device,
        dtype: str = "fp32",
        backend: str = "auto",
    ) -> None:
        self.blueprint = blueprint
        self.device = device
        self.dtype = _checked_dtype(dtype, device)
        self.runner: ReferenceEngine | GraphEngine[Any] = _runner(
            blueprint.network, device, self.dtype, backend
        )

    def labels(self, image: Tensor) -> Tensor:
        """RGB uint8 (H, W, 3), on any device, to train ids uint8 (H, W) on the engine's."""
        return self.batch_labels(image.unsqueeze(0)).squeeze(0)

    def batch_labels(self, images: Tensor) -> Tensor:
        """RGB uint8 (N, H, W, 3), on any device, to train ids uint8 (N, H, W) on the engine's."""
        return self.runner.labels(images.to(self.device), self.blueprint.size)

    def stream(self, frames: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """Label maps (H, W) of RGB uint8 frames (H, W, 3), in their order.

        Upload, computation and download of neighbouring frames overlap on a GPU, so frames are
        drawn ahead of the label maps by up to two.
        """
        return labels_of_frames(self.labels, frames, self.device)


class ReferenceEngine:
    """The folded network in plain PyTorch, on every device."""

    def __init__(self, network: FoldedNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.network = copy.deepcopy(network).eval()
        self.network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def labels(self, pixels: Tensor, size: Size | None) -> Tensor:
        """uint8 (N, H, W, 3) on the device to uint8 (N, H, W); size: of the network's input."""
        x = network_input(pixels, size).to(self.dtype)
        height, width = pixels.shape[1:3]
        with use_backend("reference"):
            return argmax_labels(self.network(x).float(), (height, width))


def _runner(
    network: FoldedNetwork, device: torch.device, dtype: torch.dtype, backend: str
) -> ReferenceEngine | GraphEngine[Any]:
    # Operations look at the device of their tensors.
    on_device = torch.empty(0, device=device)
    with nullcontext() if backend == "auto" else use_backend(backend):
        return _ENGINE(on_device, network, dtype)


def _native_engine(x: Tensor, network: FoldedNetwork, dtype: torch.dtype) -> GraphEngine[Any]:
    from lgcnet_fast.deploy.native_engine import NativeEngine

    return NativeEngine(network, x.device, dtype)


_ENGINE = Operation(
    "deploy_engine",
    reference=lambda x, network, dtype: ReferenceEngine(network, x.device, dtype),
    triton=Implementation(
        run=lambda x, network, dtype: FusedEngine(network, x.device, dtype),
        refuse=lambda x, network, dtype: None,
    ),
    cuda=Implementation(run=_native_engine, refuse=lambda x, network, dtype: None),
)


def _checked_dtype(name: str, device: torch.device) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: must be one of {', '.join(DTYPES)}")
    if name == "bf16" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < BF16_CAPABILITY:
            found, needed = (".".join(map(str, pair)) for pair in (capability, BF16_CAPABILITY))
            raise DeviceError(
                f"dtype 'bf16': {device} has compute capability {found}, bf16 needs {needed}; "
                "use fp16 or fp32"
            )
    return DTYPES[name]

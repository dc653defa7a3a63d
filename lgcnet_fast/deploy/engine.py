"""An engine: from a uint8 image to the uint8 label map of the same size, on one device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy.argmax import argmax_labels
from lgcnet_fast.deploy.blueprint import Blueprint
from lgcnet_fast.errors import ConfigError, DeviceError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BF16_CAPABILITY = (8, 0)
"""The oldest GPUs that compute in bf16; older ones only emulate it."""


class Engine:
    """Holds no state between images, so threads may share it.

    dtype: fp32, fp16 or bf16, of the weights and maps; images are normalised and logits upsampled
    in float32. Raises `ConfigError` for another dtype, `DeviceError` where the device lacks it.
    """

    def __init__(self, blueprint: Blueprint, device: torch.device, dtype: str = "fp32") -> None:
        self.blueprint = blueprint
        self.device = device
        self.dtype = _checked_dtype(dtype, device)
        network = copy.deepcopy(blueprint.network).eval()
        self.network = network.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def labels(self, image: Tensor) -> Tensor:
        """RGB uint8 (H, W, 3), on any device, to train ids uint8 (H, W) on the engine's."""
        height, width = image.shape[:2]
        pixels = image[None].to(self.device)
        x = network_input(pixels, self.blueprint.size).to(self.dtype)
        return argmax_labels(self.network(x).float(), (height, width))[0]


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

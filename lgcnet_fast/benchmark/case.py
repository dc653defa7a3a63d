"""What every subject of a benchmark does with a frame: the same images in, the same result out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lgcnet_fast.config import Size
from lgcnet_fast.deploy.engine import DTYPES
from lgcnet_fast.errors import ConfigError, DeviceError

COPIES = ("none", "in", "out", "both")


def dtype_named(name: str) -> torch.dtype:
    """Of fp32, fp16 or bf16. Raises `ConfigError`."""
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Case:
    """Raises `ConfigError` for values that mean nothing."""

    size: Size
    """(height, width) of images, network input and label map."""
    batch: int = 1
    dtype: str = "fp32"
    """fp32, fp16 or bf16, of weights and maps. In fp32, TF32 is off for every subject."""
    upsample: bool = True
    """End with uint8 labels at the images' size; else with logits at the output stride."""
    copies: str = "none"
    """Between the host's pinned memory and the GPU that count: images in, results out."""

    def __post_init__(self) -> None:
        dtype_named(self.dtype)
        if self.copies not in COPIES:
            raise ConfigError(f"copies {self.copies!r}: must be one of {', '.join(COPIES)}")
        if self.batch < 1 or min(self.size) < 1:
            height, width = self.size
            raise ConfigError(f"batch {self.batch} of {height}x{width}: all must be at least 1")

    @property
    def torch_dtype(self) -> torch.dtype:
        return dtype_named(self.dtype)

    def images(self, device: torch.device) -> Tensor:
        """The same uint8 (batch, height, width, 3) every time, on `device`.

        Smooth, not noise: where classes meet, noise would leave ties to rounding.
        """
        return _smooth_images(self.batch, self.size).to(device, copy=True)

    def check_device(self, device: torch.device) -> None:
        """Raises `DeviceError` for copies where there is no GPU to copy to."""
        if self.copies != "none" and device.type != "cuda":
            raise DeviceError(f"copies {self.copies!r}: {device} needs none; use copies = 'none'")


@lru_cache(maxsize=1)
def _smooth_images(batch: int, size: Size) -> Tensor:
    """On the CPU. Hundreds of networks are measured with the same ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 9, 17, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    pixels = fine.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()

"""What the tests of kernels with matrix products share: random maps, the bound of an error."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA = torch.cuda.is_available()


def random_map(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(..., C, H, W) in NHWC memory."""
    *outer, channels, height, width = shape
    values = torch.randn(*outer, height, width, channels, dtype=torch.float64)
    return values.to(device, dtype).movedim(-1, -3)


def random_weight(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape).to(device)


def assert_close(result: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """One rounding to the storage dtype, float32 rounding of terms of summed `magnitude`."""
    assert result.shape == truth.shape and not result.isnan().any()
    unit = 2**-52 if result.dtype == torch.float64 else 2**-24
    bound = torch.finfo(result.dtype).eps * truth.abs() + 32 * unit * magnitude
    if result.dtype == torch.float16:
        bound = bound + 2**-24
    error = (result.double() - truth).abs()
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"

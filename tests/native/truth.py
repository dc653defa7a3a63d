"""What the tests of the kernels share: tolerances by arithmetic, poisoned memory, layouts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def assert_close(
    found: Tensor, exact: Tensor, dtype: torch.dtype, terms: int = 9, slack: float = 1
) -> None:
    """Every element within one rounding to `dtype` and the float32 error of summing `terms`.

    Rounding errors are as often up as down, so they grow with the root of their number. `slack`
    is for sums of results that were rounded before.
    """
    assert found.shape == exact.shape and not found.isnan().any()
    error = (found.double() - exact.to(found.device)).abs()
    size = exact.to(found.device).abs()
    bound = ROUNDING[dtype] * 1.01 * size + slack * 2**-24 * (4 + terms**0.5) * (size.max() + 1)
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).max():.3g} x allowed"


def nhwc(tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
    return tensor.to(device).contiguous(memory_format=torch.channels_last)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A slice of a NaN-filled NHWC map; what lies around it are canaries."""
    images, channels, height, width = shape
    whole = torch.full((images, height + 2, width + 1, channels + 16), float("nan"), dtype=dtype)
    return whole.to(device).permute(0, 3, 1, 2)[:, 8:-8, 1:-1, 1:]


def assert_canaries_live(part: Tensor) -> None:
    """Nothing but `part` of its storage was written."""
    base = part._base
    assert base is not None
    part.fill_(float("nan"))
    assert base.isnan().all()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every buffer that a launcher allocates starts as NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

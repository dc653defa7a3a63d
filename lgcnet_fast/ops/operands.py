"""Checks of what users hand to operations, before anything is launched.

All raise `OperandError` naming the argument, what it is and what it must be.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lgcnet_fast.errors import OperandError


def check_map(name: str, x: Tensor) -> None:
    """A floating-point map (N, C, H, W) that holds something."""
    if x.ndim != 4:
        raise OperandError(f"{name}: shape {tuple(x.shape)}, need a map (N, C, H, W)")
    if 0 in x.shape:
        raise OperandError(f"{name}: empty map of shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise OperandError(f"{name}: dtype {x.dtype}, need a floating-point map")


def check_size(name: str, size: Sequence[int]) -> None:
    """(height, width), both positive."""
    if len(size) != 2 or min(size) < 1:
        raise OperandError(f"{name}: {tuple(size)}, need a positive (height, width)")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise OperandError(f"{name}: shape {tuple(x.shape)}, need {shape}")


def check_beside(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """On the device of another argument."""
    if x.device != other.device:
        raise OperandError(f"{name}: on {x.device}, {other_name} is on {other.device}")

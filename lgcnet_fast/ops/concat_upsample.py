"""Bilinear resizing with aligned corners: alone, before a concatenation and before a sum.

Kernels read and write dense NHWC maps; others are copied for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import fused_resize
from lgcnet_fast.ops.backend import Operation
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape, check_size

Size = tuple[int, int]


def upsample(x: Tensor, size: Size) -> Tensor:
    """Bilinear, align_corners=True: (N, C, h, w) -> (N, C, *size); x itself if the size fits.

    Aligned corners map sizes n -> 2n - 1 exactly, which is how LGCNet's 16k + 1 inputs grow back.
    Raises `OperandError`.
    """
    check_map("x", x)
    check_size("size", size)
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return _upsample(x, size)


def concat_upsample(maps: Sequence[Tensor], size: Size) -> Tensor:
    """Concatenation along channels of maps (N, C_i, h_i, w_i), each resized to `size` first.

    Maps of several dtypes give the widest. Raises `OperandError`.
    """
    check_maps(maps, size)
    return upsample(maps[0], size) if len(maps) == 1 else _concat_upsample(maps, size)


def sum_upsample(maps: Sequence[Tensor], size: Size) -> Tensor:
    """Sum of maps (N, C, h_i, w_i), each resized to `size` first.

    Maps of several dtypes give the widest. Raises `OperandError`.
    """
    check_maps(maps, size)
    for index, x in enumerate(maps):
        check_shape(f"maps[{index}]", x, (*maps[0].shape[:2], *x.shape[2:]))
    return upsample(maps[0], size) if len(maps) == 1 else _sum_upsample(maps, size)


def resize(x: Tensor, size: Size) -> Tensor:
    """The plain form of `upsample`."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def check_maps(maps: Sequence[Tensor], size: Size) -> None:
    """Raises `OperandError` unless these are maps that can be resized to `size` together."""
    if not maps:
        raise OperandError("maps: none given")
    check_size("size", size)
    for index, x in enumerate(maps):
        name = f"maps[{index}]"
        check_map(name, x)
        check_shape(name, x, (maps[0].shape[0], *x.shape[1:]))
        check_beside(name, x, "maps[0]", maps[0])


def resize_and_concatenate(maps: Sequence[Tensor], size: Size) -> Tensor:
    """The plain form of `concat_upsample`."""
    return torch.cat([resize(x, size) for x in maps], dim=1)


def _resize_and_add(maps: Sequence[Tensor], size: Size) -> Tensor:
    total = resize(maps[0], size)
    for x in maps[1:]:
        total = total + resize(x, size)
    return total


_upsample = Operation("upsample", resize, **fused_resize.UPSAMPLE)
_concat_upsample = Operation(
    "concat_upsample", resize_and_concatenate, **fused_resize.CONCAT_UPSAMPLE
)
_sum_upsample = Operation("sum_upsample", _resize_and_add, **fused_resize.SUM_UPSAMPLE)

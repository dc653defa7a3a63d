"""Host side of csrc/hopper.cuh: kernels of sm_90 only, and boxes of maps for their accelerator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native.loader import attempt
from lgcnet_fast.native.prebuilt import Prebuilt

TENSOR_MAP = ("u8", 16)
"""struct TensorMap, as a field."""

MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on sm_90."""


def refusal(maps: Sequence[Tensor]) -> str | None:
    """Why no such kernel can serve these maps: 16-bit, dense NHWC, on an sm_90."""
    first = maps[0]
    if first.device.type != "cuda" or torch.cuda.get_device_capability(first.device) != (9, 0):
        return "it is for GPUs of sm_90"
    if first.dtype not in (torch.float16, torch.bfloat16):
        return f"maps are {first.dtype}, not 16-bit"
    for one in maps:
        if one.data_ptr() % 16 or not one.is_contiguous(memory_format=torch.channels_last):
            return "a map is not dense NHWC"
    return route_refusal()


def route_refusal() -> str | None:
    """Why the extension, which alone has these kernels, does not serve here."""
    launcher, reason = attempt(Prebuilt)
    if launcher is None:
        return reason
    return None if launcher.hopper else "the extension holds no code for sm_90"


def tensor_map(feature_map: Tensor, channels: int, columns: int, rows: int) -> np.ndarray:
    """The driver's description of boxes of a dense NHWC map of 16-bit values.

    A box: `rows` x `columns` of `channels`, 16 or 64, swizzled as csrc/hopper.cuh says. Raises
    `RuntimeError` with the driver's error code.
    """
    images, depth, height, width = feature_map.shape
    size = feature_map.element_size()
    pixel = depth * size
    aligned = np.zeros(24, "u8")  # the driver wants 64 bytes of alignment
    first = -(aligned.ctypes.data // 8) % 8
    found = aligned[first : first + 16]
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(found.ctypes.data),
        BFLOAT16 if feature_map.dtype == torch.bfloat16 else FLOAT16,
        4,
        ctypes.c_void_p(feature_map.data_ptr()),
        (ctypes.c_uint64 * 4)(depth, width, height, images),
        (ctypes.c_uint64 * 3)(pixel, width * pixel, height * width * pixel),
        (ctypes.c_uint32 * 4)(channels, columns, rows, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        NO_INTERLEAVE,
        SWIZZLE_OF[channels * size],
        PROMOTE_TO_128_BYTES,
        ZEROS_OUTSIDE,
    )
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: CUDA error {error}")
    return found


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# Of cuda.h.
FLOAT16, BFLOAT16 = 6, 9
NO_INTERLEAVE, PROMOTE_TO_128_BYTES, ZEROS_OUTSIDE = 0, 2, 0
SWIZZLE_OF = {32: 1, 128: 3}
"""By the bytes that it goes over."""


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")

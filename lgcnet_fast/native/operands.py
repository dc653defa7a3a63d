"""Tensors as the kernels see them: checks, addresses and strides, vector widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native.instances import BYTES
from lgcnet_fast.native.launcher import Launcher

STORAGE = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}

VIEW = np.dtype(
    [("data", "u8"), ("image_stride", "i8"), ("row_stride", "i8"), ("pixel_stride", "i8")],
    align=True,
)
"""struct View of csrc/numeric.cuh."""


def check_map(name: str, feature_map: Tensor, launcher: Launcher) -> None:
    """Raises `ValueError` unless `name` is a non-empty (N, C, H, W) map with adjacent channels."""
    shape = tuple(feature_map.shape)
    if feature_map.ndim != 4:
        raise ValueError(f"{name}: need a map (N, C, H, W), got shape {shape}")
    if feature_map.numel() == 0:
        raise ValueError(f"{name}: empty map of shape {shape}")
    if feature_map.dtype not in STORAGE:
        known = ", ".join(map(str, STORAGE))
        raise ValueError(f"{name}: dtype {feature_map.dtype} is not one of {known}")
    if feature_map.device.type != launcher.device_type:
        raise ValueError(f"{name}: on {feature_map.device}, need a {launcher.device_type} tensor")
    _check_nhwc(name, feature_map)


def check_dense_maps(
    name: str, maps: Sequence[Tensor], like: Tensor | None, launcher: Launcher
) -> None:
    """Raises `ValueError` unless all are dense NHWC maps of the shape, dtype, device of `like`."""
    if like is None:
        raise ValueError(f"{name}: need at least one map")
    for index, feature_map in enumerate(maps):
        one = f"{name}[{index}]"
        check_map(one, feature_map, launcher)
        check_same(one, feature_map, tuple(like.shape), like.dtype, like.device)
        if not feature_map.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{one}: strides {feature_map.stride()} of shape {tuple(like.shape)} are not dense "
                "NHWC; call .contiguous(memory_format=torch.channels_last)"
            )


def check_dense(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """As `check_same`, and the tensor must be contiguous."""
    check_same(name, tensor, shape, dtype, device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}, need a contiguous tensor")


def check_output(name: str, feature_map: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises `ValueError` unless `name` can take an NHWC map of this shape, typed as `like`."""
    check_same(name, feature_map, shape, like.dtype, like.device)
    _check_nhwc(name, feature_map)
    _, channels, height, width = shape
    pixel = feature_map.stride(3) if width > 1 else channels
    row = feature_map.stride(2) if height > 1 else width * pixel
    image = feature_map.stride(0) if shape[0] > 1 else height * row
    if pixel < channels or row < (width - 1) * pixel + channels or image < (height - 1) * row:
        raise ValueError(f"{name}: with strides {feature_map.stride()} its elements overlap")


def check_same(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises `ValueError` unless `name` has this shape, dtype and device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, need {shape}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: dtype {tensor.dtype}, need {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, the other tensors are on {device}")


def empty_map(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense NHWC map (N, C, H, W), dtype and device those of `like`."""
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def empty_floats(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def view_of(feature_map: Tensor) -> tuple[int, int, int, int]:
    """The fields of a VIEW."""
    image, _, row, pixel = feature_map.stride()
    return feature_map.data_ptr(), image, row, pixel


def pack(dtype: np.dtype, fields: tuple[object, ...]) -> np.ndarray:
    """A kernel's argument struct, as an array of that one element (what CuPy passes by value)."""
    return np.array([fields], dtype=dtype)


def widest_vector(options: Iterable[int], *maps: Tensor) -> int:
    """The first of the vector widths (channels a thread, widest first) that suits all the maps."""
    for vector in options:
        if vector == 1 or all(_fits(vector, feature_map) for feature_map in maps):
            return vector
    raise ValueError(f"no vector of {tuple(options)} channels fits all the maps' strides")


def block_of(vectors: int, threads: int) -> tuple[int, int, int]:
    """A block (channel vectors, pixels, 1) of at most `threads`, and how many tile the channels.

    Returns (vectors a block, pixels a block, channel tiles).
    """
    tiles = -(-vectors // threads)
    across = -(-vectors // tiles)
    return across, max(1, threads // across), tiles


def _check_nhwc(name: str, feature_map: Tensor) -> None:
    shape, strides = tuple(feature_map.shape), feature_map.stride()
    if shape[1] > 1 and strides[1] != 1:
        raise ValueError(
            f"{name}: strides {strides} of shape {shape} are not NHWC (channels of a pixel "
            "adjacent); call .contiguous(memory_format=torch.channels_last)"
        )
    if shape[3] * strides[3] >= 2**31:
        raise ValueError(f"{name}: a row of {shape[3]} x {strides[3]} elements is too long")


def _fits(vector: int, feature_map: Tensor) -> bool:
    """Whether vectors divide the channels and every address is a multiple of a vector (or 16)."""
    size = BYTES[STORAGE[feature_map.dtype]]
    alignment = min(vector * size, 16)
    steps = [
        stride * size
        for extent, stride in zip(feature_map.shape, feature_map.stride(), strict=True)
        if extent > 1 and stride != 1
    ]
    return feature_map.shape[1] % vector == 0 and all(
        address % alignment == 0 for address in (feature_map.data_ptr(), *steps)
    )

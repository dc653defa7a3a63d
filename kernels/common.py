"""What every kernel family shares: argument checks, the accumulator dtype, the final reduction."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.launches import INTERPRETED, kernel, wait_for_predecessor

Result = TypeVar("Result")
STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on an H200."""


def accumulator(storage: torch.dtype) -> tl.dtype:
    """float32; float64 storage, which serves gradient checks, accumulates in float64."""
    return tl.float64 if storage == torch.float64 else tl.float32


def accumulator_dtype(storage: torch.dtype) -> torch.dtype:
    """The torch dtype of `accumulator`: that of statistics, weight gradients and partial sums."""
    return torch.float64 if storage == torch.float64 else torch.float32


def check_map(name: str, feature_map: Tensor) -> None:
    """Raises `ValueError` unless the argument `name` is a non-empty, dense NHWC feature map."""
    shape, dtype = tuple(feature_map.shape), feature_map.dtype
    if feature_map.ndim != 4:
        raise ValueError(f"{name}: need a map (N, C, H, W), got shape {shape}")
    if feature_map.numel() == 0:
        raise ValueError(f"{name}: empty map of shape {shape}")
    if dtype not in STORAGE:
        raise ValueError(f"{name}: dtype {dtype} is not one of {', '.join(map(str, STORAGE))}")
    if not feature_map.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name}: strides {feature_map.stride()} of shape {shape} are not dense channels_last; "
            "call .contiguous(memory_format=torch.channels_last)"
        )


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises `ValueError` unless the argument `name` has this shape and the device of `like`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, need {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, the other arguments are on {like.device}")


def check_dense(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """As `check_like`, and the tensor must be contiguous."""
    check_like(name, tensor, shape, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}, need a contiguous tensor")


def empty_map(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised (..., C, H, W), dense NHWC, with the dtype and device of `like`."""
    *outer, channels, height, width = shape
    return like.new_empty(*outer, height, width, channels).movedim(-1, -3)


def operand(storage: torch.dtype) -> tl.dtype:
    """What kernels give to `tl.dot`: the storage dtype on a GPU.

    Triton's interpreter multiplies the bits of bfloat16, so there it is the accumulator's dtype,
    which holds the same values.
    """
    if INTERPRETED:
        return accumulator(storage)
    return {
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float32: tl.float32,
    }[storage]


def check_product(name: str, feature_map: Tensor) -> None:
    """Raises `ValueError` where `tl.dot` has no fast product of this map's dtype.

    Triton multiplies in matrix units from compute capability 8.0 on; before, and for float64, its
    code spills or does not compile. The interpreter serves every dtype.
    """
    if INTERPRETED:
        return
    if feature_map.dtype == torch.float64:
        raise ValueError(f"{name}: float64 is served by Triton's interpreter only")
    major, minor = torch.cuda.get_device_capability(feature_map.device)
    if major < 8:
        raise ValueError(f"{name}: on a GPU of compute capability {major}.{minor}, need 8.0")


@triton.jit
def _sum_tile(
    partial_ptr, out_ptr, program, rows, columns, C,
    TAPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums the columns of a program over all rows; several TAPS: (B, TAPS, C) as (B, C, TAPS)."""
    column = program * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    lane = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=partial_ptr.dtype.element_ty)
    for first in range(0, rows, BLOCK_ROWS):
        row = (first + lane)[:, None]
        offset = row.to(tl.int64) * columns + column[None, :]
        total += tl.load(
            partial_ptr + offset, mask=(row < rows) & (column < columns)[None, :], other=0.0
        )
    place = column
    if TAPS > 1:
        place = column // (TAPS * C) * (TAPS * C) + column % C * TAPS + column // C % TAPS
    tl.store(out_ptr + place, tl.sum(total, axis=0), mask=column < columns)


@kernel
def _sum_rows_kernel(
    partial_ptr, out_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """out[c] = sum_r partial[r, c]; each program owns its columns, so the order is fixed."""
    wait_for_predecessor()
    program = tl.program_id(0)
    _sum_tile(partial_ptr, out_ptr, program, rows, columns, columns, 1, BLOCK_ROWS, BLOCK_COLUMNS)


@kernel(do_not_specialize=["window_rows", "product_rows"])
def _sum_shares_kernel(
    window_ptr, window_out_ptr, window_rows, window_columns, C,
    product_ptr, product_out_ptr, product_rows, product_columns,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    PRODUCT_ROWS: tl.constexpr, PRODUCT_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_sum_rows_kernel` of windows (B, 9, C), which it writes as (B, C, 9), then of products."""
    wait_for_predecessor()
    window_programs = tl.cdiv(window_columns, WINDOW_COLUMNS)
    program = tl.program_id(0)
    if program < window_programs:
        _sum_tile(
            window_ptr, window_out_ptr, program, window_rows, window_columns, C,
            9, WINDOW_ROWS, WINDOW_COLUMNS,
        )  # fmt: skip
    else:
        _sum_tile(
            product_ptr, product_out_ptr, program - window_programs, product_rows, product_columns,
            product_columns, 1, PRODUCT_ROWS, PRODUCT_COLUMNS,
        )  # fmt: skip


def has_matrix_units(x: Tensor) -> bool:
    """Whether products of values like x run in matrix units that Triton uses well: 16 bits, sm_80.

    Elsewhere libraries tile better. The interpreter stands in for all of them.
    """
    if INTERPRETED:
        return True
    return x.dtype.itemsize == 2 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def has_large_cores(x: Tensor) -> bool:
    """Whether a program may have as much shared memory as on an H200."""
    if INTERPRETED or not x.is_cuda:
        return True
    return _shared_memory(x.device.index) >= MOST_SHARED


@cache
def _shared_memory(device: int) -> int:
    """Bytes that one program may have."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return int(properties["max_shared_mem"])


_unsummed: ContextVar[list[Tensor] | None] = ContextVar("unsummed", default=None)
"""What `sum_rows` has left to others."""


def unsummed(function: Callable[[], Result]) -> tuple[Result, Tensor | None]:
    """What it returns, and what `sum_rows` should have summed at its end, for `sum_shares`.

    The sum itself is then not in the result. None where it sums nothing.
    """
    kept: list[Tensor] = []
    token = _unsummed.set(kept)
    try:
        result = function()
    finally:
        _unsummed.reset(token)
    return result, kept[-1] if kept else None


def sum_shares(windows: Tensor, products: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight gradients from the shares of all programs, both in one launch.

    windows: (rows, ..., 3, 3, C) of depthwise convolutions, which become (B, C, 3, 3), as
    parameters lie in memory; products: (other rows, B, C_out, C) of the pointwise ones; both
    contiguous. Same bits on every run.
    """
    channels = windows.shape[-1]
    windows = windows.view(len(windows), -1)
    window_out = windows.new_empty(windows.shape[1] // (9 * channels), channels, 3, 3)
    window_tile = _tile(len(windows))
    programs = triton.cdiv(windows.shape[1], window_tile[1])
    if products is None:
        product_out, product_rows, product_columns, product_tile = None, 0, 0, (1, 1)
    else:
        product_out = products.new_empty(products.shape[1:])
        product_rows, product_columns = len(products), product_out.numel()
        product_tile = _tile(product_rows)
        programs += triton.cdiv(product_columns, product_tile[1])
    _sum_shares_kernel[(programs,)](
        windows, window_out, len(windows), windows.shape[1], channels,
        windows if products is None else products, window_out if products is None else product_out,
        product_rows, product_columns,
        WINDOW_ROWS=window_tile[0], WINDOW_COLUMNS=window_tile[1],
        PRODUCT_ROWS=product_tile[0], PRODUCT_COLUMNS=product_tile[1],
    )  # fmt: skip
    return window_out, product_out


def _tile(rows: int) -> tuple[int, int]:
    """Rows and columns: up to 2048 values, at least the 32 bytes of a memory transaction."""
    block_rows = min(256, triton.next_power_of_2(rows))
    return block_rows, min(128, 2048 // block_rows)


def sum_rows(
    partial: Tensor,
    block_rows: int = 256,
    block_columns: int = 8,
    at_once: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Second stage of every reduction: (rows, ...) -> (...), same bits on every run.

    at_once: also within `unsummed`. dtype: of the result; by default that of `partial`.

    The columns are few and the rows many, so a tile is tall: 8 columns of float32 fill the 32
    bytes that one memory transaction brings.
    """
    if not at_once and (kept := _unsummed.get()) is not None:
        kept.append(partial)
        return partial[0]
    rows, shape = partial.shape[0], partial.shape[1:]
    out = partial.new_empty(shape, dtype=dtype)
    columns = out.numel()
    block_rows = min(block_rows, triton.next_power_of_2(rows))
    grid = (triton.cdiv(columns, block_columns),)
    _sum_rows_kernel[grid](
        partial, out, rows, columns, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns
    )
    return out

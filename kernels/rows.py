"""Rows of NHWC maps as runs of vectors of channels, for kernels of up to four maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import check_like, check_map, empty_map

MAX_MAPS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class StripConfig:
    """Work of one program: `block` elements of each of `rows` rows of a map."""

    block: int
    rows: int
    warps: int


@triton.jit
def row_vectors(block, per_pixel, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Pixels (GROUPS, 1) and channels (GROUPS, VECTOR) of one block of a row of pixels.

    A row is a run of vectors of VECTOR channels, `per_pixel` of them a pixel.
    """
    group = block * GROUPS + tl.arange(0, GROUPS)
    pixel = group // per_pixel
    channel = (group - pixel * per_pixel) * VECTOR
    return pixel[:, None], channel[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def row_pointer(base_ptr, batch, row, rows, row_elements):
    """Pointer to a row of a map; 64-bit, as a map may hold more than 2^31 elements."""
    return base_ptr + (batch * rows + row).to(tl.int64) * row_elements


@triton.jit
def copy_strip(
    source_ptr, source_pitch, target_ptr, target_pitch, batch, first, pixel, channel,
    height, width, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows `first` .. `first` + ROWS - 1 from one map to another; `pitch`: between pixels.

    All are on their way before the first is stored, as no load may pass a store.
    """
    values = ()
    for r in tl.static_range(ROWS):
        source = row_pointer(source_ptr, batch, first + r, height, width * source_pitch)
        mask = (pixel < width) & (first + r < height)
        values = values + (tl.load(source + (pixel * source_pitch + channel), mask=mask),)
    for r in tl.static_range(ROWS):
        target = row_pointer(target_ptr, batch, first + r, height, width * target_pitch)
        mask = (pixel < width) & (first + r < height)
        value = values[r].to(target_ptr.dtype.element_ty)
        tl.store(target + (pixel * target_pitch + channel), value, mask=mask)


@triton.jit
def map_of_program(
    x_ptrs, y_ptrs, heights, widths, vectors, lengths,
    MAPS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Which of the maps this program works on, so that one code serves all: (x_ptr, y_ptr, height,
    width, vectors a pixel, block of a row, first row).

    The programs of one map after the other: blocks of GROUPS vectors of rows of `lengths` pixels,
    of strips of ROWS rows.
    """
    x_ptr, y_ptr, h, w, per_pixel = x_ptrs[0], y_ptrs[0], heights[0], widths[0], vectors[0]
    program, length, begin = tl.program_id(0), lengths[0], 0
    for m in tl.static_range(1, MAPS):
        begin += tl.cdiv(lengths[m - 1] * vectors[m - 1], GROUPS) * tl.cdiv(heights[m - 1], ROWS)
        taken = tl.program_id(0) >= begin
        x_ptr, y_ptr = tl.where(taken, x_ptrs[m], x_ptr), tl.where(taken, y_ptrs[m], y_ptr)
        h, w = tl.where(taken, heights[m], h), tl.where(taken, widths[m], w)
        per_pixel = tl.where(taken, vectors[m], per_pixel)
        length = tl.where(taken, lengths[m], length)
        program = tl.where(taken, tl.program_id(0) - begin, program)
    blocks = tl.cdiv(length * per_pixel, GROUPS)
    return x_ptr, y_ptr, h, w, per_pixel, program % blocks, program // blocks * ROWS


def vector_width(dtype: torch.dtype, *channels: int) -> int:
    """Channels that one thread moves at once: up to 16 bytes, dividing all channel counts."""
    return math.gcd(16 // dtype.itemsize, *channels)


def four(values: Sequence[T]) -> list[T]:
    """The last one repeated up to MAX_MAPS: a kernel has a fixed number of arguments."""
    return [*values, *[values[-1]] * (MAX_MAPS - len(values))]


def four_sizes(maps: Sequence[Tensor]) -> list[int]:
    return [length for x in four(maps) for length in x.shape[2:]]


def checked_out(name: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`out`, dense NHWC of this shape, or a new map; dtype and device of `like`."""
    if out is None:
        return empty_map(shape, like)
    check_map(name, out)
    check_like(name, out, shape, like)
    if out.dtype != like.dtype:
        raise ValueError(f"{name}: dtype {out.dtype}, need {like.dtype}")
    return out

"""Stacks of the weights of depthwise-separable branches, as the kernels take them, in one launch:

    windows[b, ky, kx, c] = depthwise_b[c, 0, ky, kx],   matrices[b, o, c] = pointwise_b[o, c, 0, 0]

The weights lie wherever parameters lie, so a table on the device says where. Least traffic: every
weight is read and written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor

BLOCK = 2048
"""Elements of a program: a whole window of up to 227 channels."""
WARPS = 8
ALIGNMENT = 128
"""Elements from which a stack may begin, 256 bytes or more: kernels and libraries load vectors."""
COLUMNS = 5


@kernel
def _stacks_kernel(
    table_ptr, windows_out_ptr, matrices_out_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program copies up to BLOCK elements of a weight, counted in the order of the stack.

    Its row of the table: address of the weight, where the weight begins among all windows or
    matrices, its elements, the first of the program's, and C for windows, 0 for matrices.
    """
    wait_for_predecessor()
    row = table_ptr + tl.program_id(0) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(windows_out_ptr.dtype.element_ty))
    begin = tl.load(row + 1)
    size = tl.load(row + 2).to(tl.int32)
    element = tl.load(row + 3).to(tl.int32) + tl.arange(0, BLOCK)
    channels = tl.load(row + 4).to(tl.int32)
    mask = element < size
    if channels > 0:
        tap = element // channels
        value = tl.load(source + (element - tap * channels) * 9 + tap, mask=mask)
        tl.store(windows_out_ptr + begin + element, value, mask=mask)
    else:
        value = tl.load(source + element, mask=mask)
        tl.store(matrices_out_ptr + begin + element, value, mask=mask)


class WeightStacks:
    """Which weights make up which stacks. The table is copied to the device when this is made."""

    def __init__(self, stacks: Sequence[Sequence[Tensor]]) -> None:
        """stacks: weights of one shape each, all (C, 1, 3, 3) or all (C_out, C, 1, 1).

        All contiguous, of one dtype and device. Their memory, not their values, is what counts from
        now on; it stays in use.
        """
        self._weights = [[weight.detach() for weight in stack] for stack in stacks]
        self._places: list[tuple[bool, int, tuple[int, ...]]] = []
        self._sizes = {True: 0, False: 0}
        rows: list[tuple[int, ...]] = []
        for stack in self._weights:
            shape = stack[0].shape
            windows = shape[2:] == (3, 3)
            begin = self._sizes[windows]
            stacked = (3, 3, shape[0]) if windows else (shape[0], shape[1])
            self._places.append((windows, begin, (len(stack), *stacked)))
            for weight in stack:
                rows += _rows(weight, begin, windows)
                begin += weight.numel()
            self._sizes[windows] = triton.cdiv(begin, ALIGNMENT) * ALIGNMENT
        self._table = torch.tensor(rows, dtype=torch.int64, device=self._weights[0][0].device)

    def filled(self, dtype: torch.dtype) -> list[Tensor]:
        """New stacks with the weights' present values: views of two tensors.

        Windows (B, 3, 3, C) in the dtype of the weights, matrices (B, C_out, C) in `dtype`.
        """
        like = self._weights[0][0]
        every = {True: like.new_empty(self._sizes[True])}
        every[False] = like.new_empty(self._sizes[False], dtype=dtype)
        _stacks_kernel[(len(self._table),)](
            self._table, every[True], every[False],
            COLUMNS=COLUMNS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return [
            every[windows][begin : begin + math.prod(shape)].view(shape)
            for windows, begin, shape in self._places
        ]


def _rows(weight: Tensor, begin: int, windows: bool) -> list[tuple[int, ...]]:
    """Of the table, for one weight."""
    size, channels = weight.numel(), len(weight) if windows else 0
    address = weight.data_ptr()
    return [(address, begin, size, first, channels) for first in range(0, size, BLOCK)]

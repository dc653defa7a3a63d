"""Kernels in a module of their own, which other processes can import."""

import os

import triton
import triton.language as tl

from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor


@kernel
def copy(x, y, size, BLOCK: tl.constexpr):
    """In many steps, so that it takes a while to compile."""
    wait_for_predecessor()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size)
    for _ in tl.static_range(60):
        value = tl.exp(tl.log(value))
    tl.store(y + at, value, mask=at < size)


@kernel
def negate(x, y, size, BLOCK: tl.constexpr):
    """Compiled before `copy`, as its name is longer."""
    wait_for_predecessor()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, -tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def unfit(x, y, size, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK + 1), 0.0)


@triton.constexpr_function
def end_the_process():
    os._exit(1)


@triton.jit
def deadly(x, y, size, BLOCK: tl.constexpr):
    tl.store(y, end_the_process())

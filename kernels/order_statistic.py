"""The loss of the last of the hardest pixels, without sorting and without waiting for the device.

Losses of at least 0 order like their bits, so that the wanted one is found digit by digit, from
the top: each of four rounds counts, among the losses that share the digits found so far, how many
have which next digit of 8 bits. Counts come in two stages, a row a program and their sum.

Least traffic: four times the map, which mostly stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor

_DIGITS = 256


def hardest_loss(losses: Tensor, keep: float, block: int = 4096, programs: int = 264) -> Tensor:
    """Scalar float32: the ceil(keep * valid)-th largest loss, infinite if that number is 0.

    losses: contiguous float32, negative where a pixel does not count; `valid` is the number of
    the others. keep: 0 to 1. A NaN ranks as infinite.
    """
    blocks = triton.cdiv(losses.numel(), block)
    programs = min(programs, blocks)
    counts = losses.new_empty((programs, _DIGITS), dtype=torch.int32)
    # Found digits, rank among the losses that share them; on the device, as is `keep`: a kernel's
    # own arguments are float32, which would round ceil(keep * valid) differently.
    state = losses.new_zeros(2, dtype=torch.int64)
    share = losses.new_full((), keep, dtype=torch.float64)
    hardest = losses.new_empty(())
    for shift in (24, 16, 8, 0):
        _count_kernel[(programs,)](
            losses, counts, state, losses.numel(), triton.cdiv(blocks, programs),
            SHIFT=shift, DIGITS=_DIGITS, BLOCK=block, num_warps=8,
        )  # fmt: skip
        _select_kernel[(1,)](
            counts, state, share, hardest, programs,
            FIRST=shift == 24, LAST=shift == 0, DIGITS=_DIGITS, ROWS=64, num_warps=8,
        )  # fmt: skip
    return hardest


@kernel
def _count_kernel(
    losses_ptr, counts_ptr, state_ptr, pixels, blocks,
    SHIFT: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts[program, d]: losses of the program's blocks with the found digits, then digit d."""
    wait_for_predecessor()
    found = tl.load(state_ptr)
    counts = tl.zeros((DIGITS,), tl.int32)
    for k in range(blocks):
        pixel = (k * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK
        pixel += tl.arange(0, BLOCK)
        loss = tl.load(losses_ptr + pixel, mask=pixel < pixels, other=-1.0)
        loss = tl.where(loss == loss, loss, float("inf"))
        bits = loss.to(tl.int32, bitcast=True)
        # A shift of the upper 32 - SHIFT bits by 8 more would not be defined for SHIFT = 24.
        candidate = (bits >= 0) & ((bits >> SHIFT) >> 8 == found)
        digit = tl.where(candidate, (bits >> SHIFT) & (DIGITS - 1), 0)
        counts += tl.histogram(digit, DIGITS)
        # The others were all counted as digit 0.
        others = BLOCK - tl.sum(candidate.to(tl.int32), axis=0)
        counts -= tl.where(tl.arange(0, DIGITS) == 0, others, 0)
    tl.store(counts_ptr + tl.program_id(0) * DIGITS + tl.arange(0, DIGITS), counts)


@kernel
def _select_kernel(
    counts_ptr, state_ptr, share_ptr, hardest_ptr, programs,
    FIRST: tl.constexpr, LAST: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Picks the digit in which the wanted rank lies; one program."""
    wait_for_predecessor()
    # Read before the reductions, whose barriers keep all reads ahead of the writes at the end.
    found = tl.load(state_ptr)
    rank = tl.load(state_ptr + 1)
    digit = tl.arange(0, DIGITS)
    totals = tl.zeros((ROWS, DIGITS), tl.int32)
    for start in range(0, programs, ROWS):
        program = (start + tl.arange(0, ROWS))[:, None]
        totals += tl.load(
            counts_ptr + program * DIGITS + digit[None, :], mask=program < programs, other=0
        )
    count = tl.sum(totals, axis=0).to(tl.int64)
    up_to = tl.cumsum(count, axis=0)
    everything = tl.sum(count, axis=0)
    if FIRST:
        rank = tl.ceil(tl.load(share_ptr) * everything.to(tl.float64)).to(tl.int64)
    # Digits whose losses, with all larger ones, are not enough: the wanted one is the next below.
    above = everything - up_to + count
    chosen = DIGITS - 1 - tl.sum((above < rank).to(tl.int64), axis=0)
    larger = everything - tl.sum(tl.where(digit <= chosen, count, 0), axis=0)
    found = found * DIGITS + chosen
    tl.store(state_ptr, found)
    tl.store(state_ptr + 1, rank - larger)
    if LAST:
        loss = found.to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(hardest_ptr, tl.where(rank > 0, loss, float("inf")))

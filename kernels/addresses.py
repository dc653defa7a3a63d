"""Tensors whose addresses kernels find in memory, so that a CUDA graph can be launched on others.

A graph holds the arguments of its kernels. Where one of them is the place of an address, rather
than the address, a frame costs the host no call but the launch: the host writes the addresses of
the frames that it hands over into a ring of slots in pinned memory, and the first kernel of the
graph takes the next slot into the memory of the GPU, where the others look.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class AtAddress:
    """A contiguous uint8 tensor; address: int64 (1,), of its first element."""

    address: Tensor
    shape: tuple[int, ...]


def as_argument(data: Tensor | AtAddress) -> tuple[Tensor, bool]:
    """What a kernel is given, and whether that is the place of an address."""
    return (data.address, True) if isinstance(data, AtAddress) else (data, False)


def take_slot(slots: Tensor, turn: Tensor, addresses: Tensor) -> None:
    """Copies slot `turn` to `addresses` and moves on to the next; after the last comes the first.

    slots: int64 (R, 2), which the host may write until the launch; turn: int32 (1,), addresses:
    int64 (2,), which kernels alone write.
    """
    _take_slot_kernel[(1,)](slots, turn, addresses, SLOTS=len(slots), num_warps=1)


@triton.jit
def _take_slot_kernel(slots_ptr, turn_ptr, addresses_ptr, SLOTS: tl.constexpr):
    """Grid (1,). All scalars, which one thread stores, and not before it has loaded the turn."""
    turn = tl.load(turn_ptr)
    # Volatile, as a cache may hold what the slot was a round ago. Both reads cross the bus at once.
    first = tl.load(slots_ptr + 2 * turn, volatile=True)
    second = tl.load(slots_ptr + (2 * turn + 1), volatile=True)
    tl.store(addresses_ptr, first)
    tl.store(addresses_ptr + 1, second)
    tl.store(turn_ptr, (turn + 1) % SLOTS)


@triton.jit
def bytes_at(address_ptr):
    """Pointer to the uint8 tensor whose address lies there."""
    return tl.load(address_ptr).to(tl.pointer_type(tl.uint8))

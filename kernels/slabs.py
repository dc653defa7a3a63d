"""Slabs of positions: the share of a map that one program of a reducing kernel adds up.

Each thread of a program adds up its own channels and positions while the program walks down the
slab, with the loads of a tile in flight; once, at the end, the threads add up theirs. There are no
more programs than the GPU holds at once, so that the one that adds up their shares has few. It
loads as many at once as it has registers for: a few loads that wait for one another take as long as
a small map. See last_program.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lgcnet_fast.kernels.launches import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)

MOST_SLABS = 512
"""More would take one program long to add up."""
SHARES = 32
"""Values that a thread loads at once of the sums that it adds up over the slabs. More would take
registers, and with them programs, from all the others."""
FEW_MAPS = 2
"""Whose sums take larger programs."""
MOST_ELEMENTS = 2**30
"""Of a slab, so that offsets in it are 32-bit."""


@dataclass(frozen=True)
class SlabConfig:
    """Of one program: `block_c` channels; a thread loads `loads` vectors of 16 bytes of each map.

    As many are of the tile that follows, which is on its way while one is added up.
    """

    block_c: int
    warps: int
    loads: int
    maps: int
    """That a program takes, of those that are multiplied with a shared one."""
    programs: int
    """The most that a launch has, but for maps that are very large."""

    @classmethod
    def default(cls, channels: int, maps: int, gradients: bool = False) -> SlabConfig:
        """For sums over so many maps, on 132 multiprocessors, as measured on an H200.

        Of one map or two, programs take few channels: the last one of each group of channels then
        has little to add up. Blocks divide the channels, as a thread without one would wait for the
        others. gradients: sums of products with a shared map. As the last program of those adds up
        all channels, there is nothing to gain from many blocks of them, and its registers leave
        room for three programs on each multiprocessor.
        """
        wide = triton.next_power_of_2(channels)
        dividing = channels & -channels if channels % 16 == 0 else wide
        if maps <= FEW_MAPS:
            block_c = min(16, dividing)
            if gradients:
                return cls(block_c, warps=4, loads=4, maps=1, programs=264)
            return cls(block_c, warps=8, loads=4, maps=1, programs=132)
        if gradients:
            return cls(min(64, wide), warps=4, loads=4, maps=1, programs=396)
        return cls(min(32, dividing), warps=4, loads=4, maps=1, programs=528)

    def rows(self, dtype: torch.dtype) -> int:
        """Positions of which a thread loads one vector."""
        return max(1, self.warps * 32 * (16 // dtype.itemsize) // self.block_c)

    def shares(self, slabs: int, values: int) -> int:
        """Slabs whose shares, of so many values each, a program adds up in one step."""
        most = max(1, self.warps * 32 * SHARES // values)
        return min(triton.next_power_of_2(slabs), 1 << most.bit_length() - 1)

    def slab(self, positions: int, channels: int, shares: int, tile: int) -> int:
        """Positions of a slab, whole tiles; `shares`: programs that a slab has."""
        slabs = min(MOST_SLABS, max(1, self.programs // shares))
        slabs = max(slabs, triton.cdiv(positions * channels, MOST_ELEMENTS))
        return triton.cdiv(triton.cdiv(positions, tile), slabs) * tile


@triton.jit
def load_tile(
    map_ptr, first, count, C, inside, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
):  # fmt: skip
    """LOADS tensors (BLOCK_M, BLOCK_C) of the positions from `first` on; 0 from `count` on.

    map_ptr: (1, BLOCK_C), the channels of position 0; inside: which of them there are.
    """
    row = tl.arange(0, BLOCK_M)[:, None]
    values = ()
    for load in tl.static_range(LOADS):
        position = first + load * BLOCK_M + row
        mask = (position < count) & inside
        values = values + (tl.load(map_ptr + position * C, mask=mask, other=0.0),)
    return values


@triton.jit
def pointer_of(pointers, index, COUNT: tl.constexpr):
    """pointers[index] of COUNT pointers, for an index, or a tensor of them, of the run time."""
    chosen = pointers[0]
    for k in tl.static_range(1, COUNT):
        chosen = tl.where(index == k, pointers[k], chosen)
    return chosen


@triton.jit
def sums_of(tensors):
    """(1, BLOCK_C) of each of the tensors (BLOCK, BLOCK_C), two in one exchange of the threads.

    Not in the interpreter, where reductions of several values take long.
    """
    sums = ()
    for i in tl.static_range(0, len(tensors), 1 if _INTERPRETED else 2):
        if i + 1 < len(tensors) and not _INTERPRETED:
            first, second = tl.reduce((tensors[i], tensors[i + 1]), 0, _add_two)
            sums = sums + (first[None, :], second[None, :])
        else:
            sums = sums + (tl.sum(tensors[i], axis=0)[None, :],)
    return sums


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d

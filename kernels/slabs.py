"""Slabs of positions: the share of a map that one program of a reducing kernel adds up.

Each thread of a program adds up its own channels and positions while the program walks down the
slab, with several loads in flight; once, at the end, the threads add up theirs. There are no more
programs than the GPU holds at once, so that the one that adds up their shares has few; see
last_program.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST_SLABS = 512
"""More would take one program long to add up."""
SHARES = 8
"""Values that a thread loads at once of each of the sums that it adds up over the slabs."""
FEW_MAPS = 2
"""Whose sums take larger programs."""
MOST_ELEMENTS = 2**30
"""Of a slab, so that offsets in it are 32-bit."""


@dataclass(frozen=True)
class SlabConfig:
    """Of one program: `block_c` channels; a thread holds `loads` vectors of 16 bytes of maps.

    Half of them are of the tile that follows, which is on its way while one is added up.
    """

    block_c: int
    warps: int
    loads: int
    maps: int
    """That a program takes, of those that are multiplied with a shared one."""
    programs: int
    """The most that a launch has, but for maps that are very large; half as many of four maps."""

    @classmethod
    def default(cls, channels: int, maps: int) -> SlabConfig:
        """For sums over so many maps, on 132 multiprocessors.

        Of one map or two, one program of 256 threads on each, with as many bytes on their way as
        otherwise four of 128 threads. Few channels of a program leave the one that adds up the
        shares of a group few slabs, and those fewer channels. Of several maps each has programs of
        its own: to read a shared one as often costs less than to add up twice the slabs of two.
        """
        if maps <= FEW_MAPS:
            block_c = min(32, triton.next_power_of_2(channels))
            return cls(block_c, warps=8, loads=8, maps=2, programs=132)
        block_c = min(64, triton.next_power_of_2(channels))
        return cls(block_c, warps=4, loads=8, maps=1, programs=528)

    def tile_loads(self, maps: int) -> int:
        """Vectors of a tile that a thread loads of each of `maps` maps."""
        return max(1, self.loads // (2 * maps))

    def rows(self, dtype: torch.dtype) -> int:
        """Positions of which a thread loads one vector."""
        return max(1, self.warps * 32 * (16 // dtype.itemsize) // self.block_c)

    def shares(self, maps: int = 1) -> int:
        """Slabs whose shares, of `maps` sums, a program adds up in one step."""
        return max(1, self.warps * 32 * SHARES // (self.block_c * maps))

    def slab(self, positions: int, channels: int, shares: int, tile: int, maps: int = 1) -> int:
        """Positions of a slab, whole tiles; `shares`: programs that a slab has, each of `maps`."""
        # Four sums take twice the registers of one or two.
        programs = self.programs // max(1, maps // 2)
        slabs = min(MOST_SLABS, max(1, programs // shares))
        slabs = max(slabs, triton.cdiv(positions * channels, MOST_ELEMENTS))
        return triton.cdiv(triton.cdiv(positions, tile), slabs) * tile


@triton.jit
def tile_positions(BLOCK_M: tl.constexpr, LOADS: tl.constexpr):
    """Positions (BLOCK_M, LOADS, 1) of a tile.

    Triton 3.6 gives all of the second axis to one thread, so that sums over it are free; 3.7 lays
    threads along it, with the same results from more instructions.
    """
    load = tl.arange(0, LOADS)[None, :, None]
    return load * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]


@triton.jit
def pointer_of(pointers, index, COUNT: tl.constexpr):
    """pointers[index] of COUNT pointers, for an index, or a tensor of them, of the run time."""
    chosen = pointers[0]
    for k in tl.static_range(1, COUNT):
        chosen = tl.where(index == k, pointers[k], chosen)
    return chosen

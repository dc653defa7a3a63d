"""How the work of a launch of infer_tile.py is cut into programs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

PIPELINED_KINDS = frozenset({"convolution", "interleaved", "transposed"})
"""Whose products of all taps and channels are one loop with loads on their way."""


@dataclass(frozen=True)
class TileConfig:
    """A program computes `rows` x `columns` pixels, `block_k` input channels at a time.

    stages: of the products of 3x3 windows that are on their way at once, and 1; taps: 3 or 9, of a
    depthwise filter at once.
    """

    rows: int
    columns: int
    block_k: int
    warps: int
    stages: int = 2
    taps: int = 3

    @classmethod
    def default(
        cls,
        pixels: int,
        channels: int,
        matrix_units: bool,
        kinds: Collection[str] = (),
        products: Sequence[int] = (),
    ) -> TileConfig:
        """For a node of terms of these kinds, and the channels of its products.

        Few pixels a program on the smallest maps, so that every multiprocessor has work. On maps of
        a few programs a multiprocessor what counts is how often a program waits for memory: many
        loads at once. On large maps it is the number of instructions, and how many programs have
        room: few warps, blocks that channels fill, and depthwise taps in registers. Without matrix
        units, products keep their operands in registers: few channels at a time.

        For 2^12 to 2^17 pixels these are what took least in all over the launches of four random
        networks, in float16 on an H200.
        """
        pipelined = not PIPELINED_KINDS.isdisjoint(kinds)
        if not matrix_units:
            return cls(4, 8, block_k=16, warps=8 if channels > 32 else 4, stages=1)
        if pixels < 2**12:
            return cls(2, 8, block_k=64, warps=4, stages=3, taps=9)
        if pixels < 2**13:
            if products and not pipelined:
                return cls(4, 8, block_k=64, warps=4)
            return cls(8, 8, block_k=64, warps=8, stages=3, taps=9)
        if channels > 64 or (channels == 64 and pixels >= 2**17):
            return cls(8, 8, block_k=64, warps=8, taps=9)
        if channels == 64:
            # Two warps have too few registers for a wide product that is not the last.
            narrow = len(products) > 1 and products[0] <= 64
            return cls(4, 8, block_k=32, warps=2) if narrow else cls(4, 8, block_k=64, warps=4)
        if channels % 32 == 0:
            return cls(4, 8, block_k=32, warps=2)
        if pixels < 2**17 and set(kinds) == {"separable"}:
            return cls(4, 8, block_k=64, warps=4)
        return cls(4, 8, block_k=64 if pixels < 2**17 and pipelined else 16, warps=2)

    def is_miscompiled(self, matrix_units: bool) -> bool:
        """Whether Triton may compile wrongly what computes this tile.

        Seen with Triton 3.6 on compute capability 9.0, in float16: 64 pixels in 4 warps read shared
        memory out of range, in a launch of several products; most launches were right. 64 pixels in
        8 warps and 32 in 4 were right there too. So tiles with the 16 pixels a warp, of 4 warps or
        more, that the matrix instructions of warp groups take are left alone.
        """
        return matrix_units and self.warps >= 4 and self.rows * self.columns >= 16 * self.warps

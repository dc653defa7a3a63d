"""Macro layout: channels and strides of every cell, from the few numbers that a genotype holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Head = Literal["dcfc", "mscell", "aspp", "ppm", "none"]

HEAD_BRANCHES = {"dcfc": 3, "mscell": 2, "aspp": 1, "ppm": 1, "none": 1}
"""How many taps each head reads."""

HEAD_GRAPHS: dict[str, tuple[str, ...]] = {"dcfc": ("topdown13", "grid13"), "mscell": ("mscell",)}
"""Fusion graphs of the heads that are searched."""

Width = Annotated[int, Field(strict=True, ge=1, le=4096)]
CellIndex = Annotated[int, Field(strict=True, ge=0, le=255)]
StemStride = Annotated[int, Field(strict=True, ge=1, le=2)]

STEM_STRIDE = 4


class StemShape(BaseModel):
    """Output channels and strides of the stem's three convolutions, which reach stride 4."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    widths: tuple[Width, Width, Width] = (8, 16, 32)
    strides: tuple[StemStride, StemStride, StemStride] = (2, 2, 1)

    @model_validator(mode="after")
    def _reaches_stride_4(self) -> StemShape:
        if sorted(self.strides) != [1, 2, 2]:
            raise ValueError(f"two of the stem's three strides must be 2, given {self.strides}")
        return self


@dataclass(frozen=True)
class CellLayout:
    """One cell: node width, and channels and strides of its inputs (cells k - 2 and k - 1)."""

    channels: int
    c_in0: int
    c_in1: int
    stride_in0: int
    stride_in1: int
    reduction: bool

    @property
    def reduce_first(self) -> bool:
        """s0 comes from in front of a reduction, so it has to be halved."""
        return self.stride_in0 < self.stride_in1

    @property
    def c_out(self) -> int:
        return 2 * self.channels

    @property
    def stride(self) -> int:
        return 2 * self.stride_in1 if self.reduction else self.stride_in1


@dataclass(frozen=True)
class MacroLayout:
    """The network up to its last tap; cells behind that would never be used."""

    stem: StemShape
    cells: tuple[CellLayout, ...]
    taps: tuple[int, ...]

    @property
    def tap_channels(self) -> tuple[int, ...]:
        return tuple(self.cells[tap].c_out for tap in self.taps)

    @property
    def output_stride(self) -> int:
        return self.cells[self.taps[0]].stride


def macro_layout(
    stem: StemShape, reductions: Sequence[int], widths: Sequence[int], taps: Sequence[int]
) -> MacroLayout:
    """widths: node channels before the first reduction, after the first, and so on."""
    second_stride = stem.strides[0] * stem.strides[1]
    outputs = [(stem.widths[1], second_stride), (stem.widths[2], STEM_STRIDE)]
    cells = []
    for k in range(taps[-1] + 1):
        (c_in0, stride_in0), (c_in1, stride_in1) = outputs[-2:]
        width = widths[sum(reduction <= k for reduction in reductions)]
        cell = CellLayout(width, c_in0, c_in1, stride_in0, stride_in1, k in reductions)
        cells.append(cell)
        outputs.append((cell.c_out, cell.stride))
    return MacroLayout(stem, tuple(cells), tuple(taps))


def default_taps(cells: int, reductions: Sequence[int], head: str) -> tuple[int, ...]:
    """The last cell of each of the deepest stages, as many as the head reads."""
    ends = [*(reduction - 1 for reduction in reductions), cells - 1]
    return tuple(ends[-HEAD_BRANCHES[head] :])


def check_macro(
    cells: int, reductions: Sequence[int], widths: Sequence[int], taps: Sequence[int], head: str
) -> None:
    """Raises `ValueError` with the key and the remedy if the numbers do not fit together."""
    if not _ascending(reductions) or any(not 1 <= k < cells for k in reductions):
        raise ValueError(
            f"reductions {list(reductions)} must be ascending and within the cells 1 to {cells - 1}"
        )
    if len(widths) != len(reductions) + 1:
        raise ValueError(
            f"widths {list(widths)} must have one entry more than reductions {list(reductions)}"
        )
    branches = HEAD_BRANCHES[head]
    if len(taps) != branches:
        raise ValueError(
            f"head {head!r} reads {branches} tap{'s' * (branches > 1)}, given {list(taps)}"
        )
    if not _ascending(taps) or any(not 0 <= k < cells for k in taps):
        raise ValueError(
            f"taps {list(taps)} must be ascending and within the cells 0 to {cells - 1}"
        )
    strides = [STEM_STRIDE * 2 ** sum(r <= tap for r in reductions) for tap in taps]
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise ValueError(
            f"taps {list(taps)} have strides {strides}; head {head!r} needs each to be twice the "
            f"one before: choose one cell between every two of the reductions {list(reductions)}"
        )


def _ascending(numbers: Sequence[int]) -> bool:
    return all(low < high for low, high in pairwise(numbers))

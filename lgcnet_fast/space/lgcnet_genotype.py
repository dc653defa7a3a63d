"""LGCNet genotypes: one operation an edge, and the macro numbers that rebuild the network."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lgcnet_fast.nn.cell import EDGES_PER_CELL
from lgcnet_fast.nn.fusion_graphs import FUSION_GRAPHS, FusionGraph
from lgcnet_fast.nn.operations import CELL_OPS, FUSION_OPS, UP_OPS
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.space.layout import (
    HEAD_GRAPHS,
    CellIndex,
    Head,
    MacroLayout,
    StemShape,
    Width,
    check_macro,
    macro_layout,
)
from lgcnet_fast.space.reachability import unreachable_taps


def known_operation(name: str, options: Sequence[str]) -> str:
    """Raises `ValueError` with the nearest operation."""
    if name not in options:
        near = difflib.get_close_matches(name[:40], options, n=1, cutoff=0)[0]
        raise ValueError(f"unknown operation, did you mean {near!r}? One of {', '.join(options)}")
    return name


def _five_edges(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) != EDGES_PER_CELL:
        raise ValueError(f"a cell has {EDGES_PER_CELL} edges, given {len(value)}")
    return value


CellOp = Annotated[str, AfterValidator(lambda name: known_operation(name, CELL_OPS))]
CellGenotype = Annotated[
    tuple[CellOp, CellOp, CellOp, CellOp, CellOp], BeforeValidator(_five_edges)
]


class FusionGenotype(BaseModel):
    """Fusion graph and the operation of each of its searchable edges."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: Literal["topdown13", "grid13", "mscell"]
    ops: dict[str, str]

    @model_validator(mode="after")
    def _fits_the_graph(self) -> FusionGenotype:
        names = {edge.name for edge in (*self.graph.op_edges, *self.graph.up_edges)}
        for name in sorted(names ^ self.ops.keys()):
            fault = "lacks" if name in names else "has no"
            raise ValueError(f"ops {fault} edge {name[:40]!r} of fusion graph {self.variant!r}")
        for edges, options in ((self.graph.op_edges, FUSION_OPS), (self.graph.up_edges, UP_OPS)):
            for edge in edges:
                try:
                    known_operation(self.ops[edge.name], options)
                except ValueError as error:
                    given = self.ops[edge.name][:40]
                    raise ValueError(f"ops.{edge.name}: {given!r}: {error}") from None
        return self

    @property
    def graph(self) -> FusionGraph:
        return FUSION_GRAPHS[self.variant]


class LGCNetGenotype(Genotype):
    """Cell edges are ordered i1->x1, i2->x1, i1->x2, i2->x2, x1->x2."""

    space: Literal["lgcnet"] = "lgcnet"
    stem: StemShape = StemShape()
    cells: Annotated[tuple[CellGenotype, ...], Field(min_length=1, max_length=256)]
    reductions: tuple[CellIndex, ...]
    widths: tuple[Width, ...]
    """Node channels before the first reduction, after the first, and so on."""
    taps: tuple[CellIndex, ...]
    """Cells that the head reads, finest first."""
    head: Head = "dcfc"
    fusion: FusionGenotype | None = None
    """Of heads `dcfc` and `mscell`."""

    @model_validator(mode="after")
    def _fits_together(self) -> LGCNetGenotype:
        check_macro(len(self.cells), self.reductions, self.widths, self.taps, self.head)
        variants = HEAD_GRAPHS.get(self.head, (None,))
        variant = self.fusion.variant if self.fusion else None
        if variant not in variants:
            wanted = " or ".join(repr(name) for name in variants if name) or "no fusion"
            raise ValueError(f"head {self.head!r} needs {wanted}, given fusion {variant!r}")
        for tap in unreachable_taps(self.cells, self.taps):
            raise ValueError(
                f"cell {tap}, a tap, is cut off from the stem: every way to it has a 'none' edge"
            )
        return self

    @property
    def layout(self) -> MacroLayout:
        return macro_layout(self.stem, self.reductions, self.widths, self.taps)

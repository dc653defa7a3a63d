"""Fusion cells as data (LGCNet section on the dense-connected fusion cell).

Level 0 is the finest branch; each further level has half its size. Every value has the fusion
width in channels. An edge's output carries the edge's name, so that later edges refer to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FusionEdge:
    """One step. Several sources are concatenated first.

    `op` picks one of FUSION_OPS, `up` one of UP_OPS and ends one level finer than its source;
    `join` is not searched: a fixed ReLU - 1x1 convolution - batch norm.
    """

    name: str
    kind: Literal["op", "up", "join"]
    sources: tuple[str, ...]
    level: int
    """Level of the output."""


@dataclass(frozen=True)
class FusionGraph:
    inputs: tuple[str, ...]
    """One reduced feature map a branch: level 0, 1, ..."""
    edges: tuple[FusionEdge, ...]
    """In an order in which every source precedes its use."""
    output: tuple[str, ...]
    """Values that are resized to level 0 where coarser, and summed."""

    @property
    def op_edges(self) -> tuple[FusionEdge, ...]:
        return tuple(edge for edge in self.edges if edge.kind == "op")

    @property
    def up_edges(self) -> tuple[FusionEdge, ...]:
        return tuple(edge for edge in self.edges if edge.kind == "up")

    def level(self, value: str) -> int:
        if value in self.inputs:
            return self.inputs.index(value)
        return next(edge.level for edge in self.edges if edge.name == value)


def _op(name: str, *sources: str, level: int) -> FusionEdge:
    return FusionEdge(name, "op", sources, level)


def _up(name: str, source: str, level: int) -> FusionEdge:
    return FusionEdge(name, "up", (source,), level)


def _join(name: str, *sources: str, level: int) -> FusionEdge:
    return FusionEdge(name, "join", sources, level)


TOPDOWN13 = FusionGraph(
    inputs=("a0", "b0", "c0"),
    edges=(
        _op("E1", "a0", level=0),
        _op("E2", "b0", level=1),
        _op("E3", "c0", level=2),
        _up("E4", "E3", level=1),
        _up("E5", "E2", level=0),
        _up("E6", "E3", level=1),
        _up("E7", "E6", level=0),
        _op("E8", "E1", "E5", "E7", level=0),
        _op("E9", "E2", "E4", level=1),
        _op("E10", "E3", level=2),
        _up("E11", "E9", level=0),
        _up("E12", "E10", level=1),
        _up("E13", "E12", level=0),
    ),
    output=("E8", "E11", "E13"),
)
"""Nine nodes: three inputs, middle maps E1, E2, E3, final maps E8, E9, E10. Every coarser middle
map reaches every finer branch."""

GRID13 = FusionGraph(
    inputs=("a0", "b0", "c0"),
    edges=(
        _op("E1", "a0", level=0),
        _op("E2", "b0", level=1),
        _op("E3", "c0", level=2),
        _up("E4", "b0", level=0),
        _up("E5", "c0", level=1),
        _join("a1", "E1", "E4", level=0),
        _join("b1", "E2", "E5", level=1),
        _op("E6", "a0", level=0),
        _op("E7", "b0", level=1),
        _op("E8", "c0", level=2),
        _op("E9", "a1", level=0),
        _op("E10", "b1", level=1),
        _op("E11", "E3", level=2),
        _up("E12", "b1", level=0),
        _up("E13", "E3", level=1),
        _join("a2", "E6", "E9", "E12", level=0),
        _join("b2", "E7", "E10", "E13", level=1),
        _join("c2", "E8", "E11", level=2),
    ),
    output=("a2", "b2", "c2"),
)
"""The same nine nodes without relays: in each branch 0->1, 1->2, 0->2, and four up-sampling edges
between neighbouring branches."""

MSCELL = FusionGraph(
    inputs=("b0", "c0"),
    edges=(
        _op("E1", "b0", level=0),
        _op("E2", "c0", level=1),
        _up("E3", "E2", level=0),
        _op("E4", "E1", "E3", level=0),
        _op("E5", "E2", level=1),
        _up("E6", "E5", level=0),
    ),
    output=("E4", "E6"),
)
"""Two branches, as the multi-scale cell of CAS fuses strides 8 and 16 only."""

FUSION_GRAPHS = {"topdown13": TOPDOWN13, "grid13": GRID13, "mscell": MSCELL}

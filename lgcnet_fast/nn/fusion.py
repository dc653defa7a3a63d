"""The fusion cell: interprets a fusion graph, in the supernet and in derived networks alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from lgcnet_fast.nn.fusion_graphs import FusionEdge, FusionGraph
from lgcnet_fast.nn.mixed import MixedOp
from lgcnet_fast.nn.operations import FUSION_OPS, UP_OPS, fusion_operation, up_operation
from lgcnet_fast.nn.primitives import (
    ReLUConvBN,
    Source,
    applied_together,
    is_pointwise,
    source_of,
)
from lgcnet_fast.nn.together import Part, together
from lgcnet_fast.ops import concat_upsample, sum_upsample

FUSION_WIDTH = 48
"""Channels of every value inside the fusion cell and of its output."""


class FusionCell(nn.Module):
    """Reduces each branch's map to 48 channels, runs the graph, sums its final maps.

    `make_edge` builds the module of a searchable edge from the edge and its input channels.
    """

    def __init__(
        self,
        graph: FusionGraph,
        channels: Sequence[int],
        make_edge: Callable[[FusionEdge, int], nn.Module],
        affine: bool,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.reduce = nn.ModuleList(
            ReLUConvBN(c_in, FUSION_WIDTH, affine=affine) for c_in in channels
        )
        self.edges = nn.ModuleDict()
        for edge in graph.edges:
            c_in = FUSION_WIDTH * len(edge.sources)
            self.edges[edge.name] = (
                ReLUConvBN(c_in, FUSION_WIDTH, affine=affine)
                if edge.kind == "join"
                else make_edge(edge, c_in)
            )

    def forward(
        self, features: Sequence[Tensor | Source], z: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """features: one map a branch, finest first; z: edge name -> (options,), supernet only.

        Returns (N, 48, H, W) at the size of the finest branch.
        """
        sources = [source_of(feature) for feature in features]
        sizes = [source.size for source in sources]
        reduced = applied_together(cast(list[ReLUConvBN], list(self.reduce)), sources)
        values = dict(zip(self.graph.inputs, reduced, strict=True))
        for edges in _ready_together(self.graph):
            found = together([self._part(edge, values, sizes[edge.level], z) for edge in edges])
            values |= {edge.name: value for edge, (value,) in zip(edges, found, strict=True)}
        return sum_upsample([values[name] for name in self.graph.output], sizes[0])

    def _part(
        self,
        edge: FusionEdge,
        values: Mapping[str, Tensor],
        size: tuple[int, int],
        z: Mapping[str, Tensor] | None,
    ) -> Part:
        """What an edge makes of its sources. In derived networks 1x1 convolutions read several
        sources as they are: their concatenation is neither written nor kept."""
        module = self.edges[edge.name]
        maps = [values[source] for source in edge.sources]
        weights = [] if z is None or edge.kind == "join" else [z[edge.name]]

        def value(*tensors: Tensor) -> list[Tensor]:
            sources, row = tensors[: len(maps)], tensors[len(maps) :]
            if edge.kind == "up":
                return [module(*row, *sources, size)]
            if z is None and len(sources) > 1 and is_pointwise(module):
                return [module.of_concatenation(sources, size)]
            return [module(*row, concat_upsample(sources, size))]

        return Part(value, [*maps, *weights], [module])


def _ready_together(graph: FusionGraph) -> Iterator[list[FusionEdge]]:
    """All edges in their order, those together whose sources are there at once."""
    known, waiting = set(graph.inputs), list(graph.edges)
    while waiting:
        ready = [edge for edge in waiting if known.issuperset(edge.sources)]
        yield ready
        known |= {edge.name for edge in ready}
        waiting = [edge for edge in waiting if edge not in ready]


def search_fusion_cell(graph: FusionGraph, channels: Sequence[int]) -> FusionCell:
    """Fusion cell of the supernet: every searchable edge is a mixed operation."""

    def mixed_edge(edge: FusionEdge, c_in: int) -> MixedOp:
        if edge.kind == "up":
            return MixedOp({name: up_operation(name, c_in, affine=False) for name in UP_OPS})
        return MixedOp(
            {name: fusion_operation(name, c_in, FUSION_WIDTH, affine=False) for name in FUSION_OPS}
        )

    return FusionCell(graph, channels, mixed_edge, affine=False)


def derived_fusion_cell(
    graph: FusionGraph, channels: Sequence[int], operations: Mapping[str, str]
) -> FusionCell:
    """Fusion cell of a derived network; operations: edge name -> operation."""

    def chosen_edge(edge: FusionEdge, c_in: int) -> nn.Module:
        name = operations[edge.name]
        if edge.kind == "up":
            return up_operation(name, c_in)
        return fusion_operation(name, c_in, FUSION_WIDTH)

    return FusionCell(graph, channels, chosen_edge, affine=True)

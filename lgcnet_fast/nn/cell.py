"""Cells: two input nodes, two intermediate nodes, five edges (LGCNet equations 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lgcnet_fast.nn.chosen import Term, chosen_terms, leaving_source, term_sum
from lgcnet_fast.nn.mixed import MixedOp, Terms, edge_terms, node_sum, node_weights
from lgcnet_fast.nn.operations import CELL_OPS, cell_operation
from lgcnet_fast.nn.primitives import FactorizedReduce, ReLUConvBN, Source, applied_together
from lgcnet_fast.ops import concat_pair

CELL_NODES = ("i1", "i2", "x1", "x2")
"""i1 is the output of cell k - 2, i2 that of cell k - 1; the cell's output is concat(x1, x2)."""

CELL_EDGES = (("i1", "x1"), ("i2", "x1"), ("i1", "x2"), ("i2", "x2"), ("x1", "x2"))
"""(source, target) of each edge, in the order of genotypes and architecture rows."""

EDGES_PER_CELL = len(CELL_EDGES)

_EDGES_FROM = {
    node: tuple(edge for edge, (source, _) in enumerate(CELL_EDGES) if source == node)
    for node in CELL_NODES
}
_EDGES_INTO = {
    node: tuple(edge for edge, (_, target) in enumerate(CELL_EDGES) if target == node)
    for node in ("x1", "x2")
}


def edge_stride(edge: int, reduction: bool) -> int:
    """2 for the edges of a reduction cell that leave an input node, else 1."""
    return 2 if reduction and CELL_EDGES[edge][0] in ("i1", "i2") else 1


class Cell(nn.Module):
    """Preprocessing of both inputs to `channels`; subclasses add the edges, and `halves`.

    `reduce_first` halves s0, which is larger than s1 when the previous cell was a reduction.
    """

    def __init__(
        self, c_in0: int, c_in1: int, channels: int, reduce_first: bool, affine: bool
    ) -> None:
        super().__init__()
        first = FactorizedReduce if reduce_first else ReLUConvBN
        self.preprocess0 = first(c_in0, channels, affine=affine)
        self.preprocess1 = ReLUConvBN(c_in1, channels, affine=affine)

    def forward(self, *inputs: Any) -> Tensor:
        """inputs: those of `halves`, which it concatenates. Returns (N, 2C, H', W')."""
        return concat_pair(*self.halves(*inputs))

    def halves(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The maps of x1 and x2, each (N, C, H', W')."""
        raise NotImplementedError

    def preprocessed(self, s0: Tensor | Source, s1: Tensor | Source) -> list[Tensor]:
        """The maps of i1 and i2."""
        return applied_together([self.preprocess0, self.preprocess1], [s0, s1])


class SearchCell(Cell):
    """A cell of the supernet: every edge is a mixed operation, batch norm has no affine part."""

    def __init__(
        self, c_in0: int, c_in1: int, channels: int, reduction: bool, reduce_first: bool
    ) -> None:
        super().__init__(c_in0, c_in1, channels, reduce_first, affine=False)
        self.edges = nn.ModuleList(
            _mixed_edge(channels, edge_stride(edge, reduction)) for edge in range(EDGES_PER_CELL)
        )

    def halves(
        self, s0: Tensor | Source, s1: Tensor | Source, z: Tensor | Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """s0: output of cell k - 2, s1: of cell k - 1. Returns the maps of x1 and x2.

        z: (5, 8), or what `weights_of` picked from it together with that of other cells.
        """
        weights1, weights2 = weights_of([self], z)[0] if isinstance(z, Tensor) else z
        first, second = map(Source, self.preprocessed(s0, s1))
        terms = self._leave({"i1": first, "i2": second})
        x1 = Source(node_sum([terms[edge] for edge in _EDGES_INTO["x1"]], weights1))
        terms |= self._leave({"x1": x1})
        x2 = node_sum([terms[edge] for edge in _EDGES_INTO["x2"]], weights2)
        return x1.plain(), x2

    def nodes(self) -> list[list[MixedOp]]:
        """The edges that end in x1, and those that end in x2."""
        return [
            [cast(MixedOp, self.edges[edge]) for edge in edges] for edges in _EDGES_INTO.values()
        ]

    def _leave(self, sources: Mapping[str, Source]) -> dict[int, Terms]:
        """What the edges that leave some nodes bring to their ends, by edge; sources: the maps."""
        leaving = [
            (source, [cast(MixedOp, self.edges[edge]) for edge in _EDGES_FROM[node]])
            for node, source in sources.items()
        ]
        numbers = [edge for node in sources for edge in _EDGES_FROM[node]]
        return dict(zip(numbers, edge_terms(leaving), strict=True))


def weights_of(cells: Sequence[SearchCell], z: Tensor) -> list[list[Tensor]]:
    """The weights of both nodes of each cell; z: (cells * 5, 8)."""
    weights = node_weights([node for cell in cells for node in cell.nodes()], z)
    nodes = len(_EDGES_INTO)
    return [weights[first : first + nodes] for first in range(0, len(weights), nodes)]


class DerivedCell(Cell):
    """A cell of a derived network: one operation an edge; `none` costs nothing."""

    def __init__(
        self,
        c_in0: int,
        c_in1: int,
        channels: int,
        reduction: bool,
        reduce_first: bool,
        operations: Sequence[str],
    ) -> None:
        super().__init__(c_in0, c_in1, channels, reduce_first, affine=True)
        self.stride = 2 if reduction else 1
        self.edges = nn.ModuleDict()
        for edge, name in enumerate(operations):
            operation = cell_operation(name, channels, edge_stride(edge, reduction))
            if operation is not None:
                self.edges[str(edge)] = operation

    def halves(self, s0: Tensor | Source, s1: Tensor | Source) -> tuple[Tensor, Tensor]:
        """s0: output of cell k - 2, s1: of cell k - 1. Returns the maps of x1 and x2."""
        i1, i2 = self.preprocessed(s0, s1)
        terms = self._leave({"i1": i1, "i2": i2})
        x1 = self._node("x1", terms, i2)
        source = Source(x1)
        terms |= chosen_terms(dict.fromkeys(self._chosen(_EDGES_FROM["x1"]), source))
        x2 = self._node("x2", terms, i2)
        return source.plain(), x2

    def _chosen(self, edges: Sequence[int]) -> list[nn.Module]:
        """The operations of those of the edges that have one."""
        return [self.edges[str(edge)] for edge in edges if str(edge) in self.edges]

    def _leave(self, maps: Mapping[str, Tensor]) -> dict[nn.Module, Term]:
        """What the operations that leave the input nodes bring to their ends."""
        leaving: dict[nn.Module, Source] = {}
        for node, x in maps.items():
            operations = self._chosen(_EDGES_FROM[node])
            leaving |= dict.fromkeys(operations, leaving_source(x, operations))
        return chosen_terms(leaving)

    def _node(self, node: str, terms: Mapping[nn.Module, Term], like: Tensor) -> Tensor:
        own = [terms[operation] for operation in self._chosen(_EDGES_INTO[node])]
        return term_sum(own) if own else self._zeros(like)

    def _zeros(self, like: Tensor) -> Tensor:
        """A node that no operation reaches."""
        return torch.zeros_like(like[:, :, :: self.stride, :: self.stride])


def _mixed_edge(channels: int, stride: int) -> MixedOp:
    return MixedOp(
        {
            name: cell_operation(name, channels, stride, affine=False, pool_norm=True)
            for name in CELL_OPS
        }
    )

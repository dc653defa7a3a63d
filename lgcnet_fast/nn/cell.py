"""Cells: two input nodes, two intermediate nodes, five edges (LGCNet equations 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from lgcnet_fast.nn.chosen import Term, chosen_terms, leaving_source, term_sum
from lgcnet_fast.nn.mixed import MixedOp, Terms, edge_terms, node_sum, node_weights
from lgcnet_fast.nn.operations import CELL_OPS, cell_operation
from lgcnet_fast.nn.primitives import FactorizedReduce, ReLUConvBN, Source, source_of
from lgcnet_fast.nn.together import Part, Work, worked
from lgcnet_fast.ops import concat_pair

T = TypeVar("T")

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


@dataclass(frozen=True)
class Begun(Work, Generic[T]):
    """The work of a cell that needs only s0: what the edges that leave i1 bring to their ends."""

    terms: Callable[[Sequence[Tensor]], T]
    """From what its part has computed."""


class Cell(nn.Module, Generic[T]):
    """Preprocessing of both inputs to `channels`; subclasses add the edges, `begin` and `end`.

    `reduce_first` halves s0, which is larger than s1 when the previous cell was a reduction.
    """

    def __init__(
        self, c_in0: int, c_in1: int, channels: int, reduce_first: bool, affine: bool
    ) -> None:
        super().__init__()
        first = FactorizedReduce if reduce_first else ReLUConvBN
        self.preprocess0 = first(c_in0, channels, affine=affine)
        self.preprocess1 = ReLUConvBN(c_in1, channels, affine=affine)

    def forward(self, s0: Tensor, s1: Tensor, *choice: Tensor) -> Tensor:
        """s0: output of cell k - 2, s1: of cell k - 1, choice: as for `end`.

        Returns (N, 2C, H', W').
        """
        begun = self.begin(source_of(s0))
        (maps,) = worked([begun])
        (halves,) = worked([self.end(source_of(s1), begun.terms, maps, *choice)])
        return concat_pair(*halves)

    def begin(self, s0: Source) -> Begun[T]:
        """What can be computed before s1 is there; s0: output of cell k - 2."""
        raise NotImplementedError

    def end(
        self,
        s1: Source,
        terms: Callable[[Sequence[Tensor]], T],
        maps: Sequence[Tensor],
        *choice: Any,
    ) -> Work:
        """The rest, whose part gives the maps of x1 and x2, each (N, C, H', W').

        s1: output of cell k - 1; terms: of what `begin` gave; maps: what that has computed.
        """
        raise NotImplementedError


class SearchCell(Cell[dict[int, Terms]]):
    """A cell of the supernet: every edge is a mixed operation, batch norm has no affine part."""

    def __init__(
        self, c_in0: int, c_in1: int, channels: int, reduction: bool, reduce_first: bool
    ) -> None:
        super().__init__(c_in0, c_in1, channels, reduce_first, affine=False)
        self.edges = nn.ModuleList(
            _mixed_edge(channels, edge_stride(edge, reduction)) for edge in range(EDGES_PER_CELL)
        )

    def begin(self, s0: Source) -> Begun[dict[int, Terms]]:
        x, ways = s0.rectify()
        edges = _EDGES_FROM["i1"]
        found: dict[int, tuple[Terms, int]] = {}

        def maps(x: Tensor) -> list[Tensor]:
            leaving = self._leave("i1", Source(self.preprocess0.of_rectified(x)))
            for edge, terms in leaving.items():
                found[edge] = replace(terms, maps=[]), len(terms.maps)
            return [y for edge in edges for y in leaving[edge].maps]

        def terms(maps: Sequence[Tensor]) -> dict[int, Terms]:
            rest = iter(maps)
            return {
                edge: replace(own, maps=list(islice(rest, count)))
                for edge, (own, count) in found.items()
            }

        return Begun(Part(maps, [x], [self.preprocess0, *self._leaving("i1")]), ways, terms)

    def end(
        self,
        s1: Source,
        terms: Callable[[Sequence[Tensor]], dict[int, Terms]],
        maps: Sequence[Tensor],
        *choice: Any,
    ) -> Work:
        """choice: Z's rows (5, 8), or what `weights_of` picked from them for many cells."""
        (z,) = choice
        weights = weights_of([self], z)[0] if isinstance(z, Tensor) else z
        x, ways = s1.rectify()

        def halves(x: Tensor, weights1: Tensor, weights2: Tensor, *maps: Tensor) -> list[Tensor]:
            second = Source(self.preprocess1.of_rectified(x))
            arriving = terms(maps) | self._leave("i2", second)
            x1 = Source(node_sum([arriving[edge] for edge in _EDGES_INTO["x1"]], weights1))
            arriving |= self._leave("x1", x1)
            x2 = node_sum([arriving[edge] for edge in _EDGES_INTO["x2"]], weights2)
            return [x1.plain(), x2]

        # Those that leave i1 for the products that `begin` has left to the nodes.
        leaving = [edge for node in ("i1", "i2", "x1") for edge in self._leaving(node)]
        return Work(Part(halves, [x, *weights, *maps], [self.preprocess1, *leaving]), ways)

    def nodes(self) -> list[list[MixedOp]]:
        """The edges that end in x1, and those that end in x2."""
        return [
            [cast(MixedOp, self.edges[edge]) for edge in edges] for edges in _EDGES_INTO.values()
        ]

    def _leave(self, node: str, source: Source) -> dict[int, Terms]:
        """What the edges that leave a node bring to their ends, by edge; source: its map."""
        terms = edge_terms(source, self._leaving(node))
        return dict(zip(_EDGES_FROM[node], terms, strict=True))

    def _leaving(self, node: str) -> list[MixedOp]:
        return [cast(MixedOp, self.edges[edge]) for edge in _EDGES_FROM[node]]


def weights_of(cells: Sequence[SearchCell], z: Tensor) -> list[list[Tensor]]:
    """The weights of both nodes of each cell; z: (cells * 5, 8)."""
    weights = node_weights([node for cell in cells for node in cell.nodes()], z)
    nodes = len(_EDGES_INTO)
    return [weights[first : first + nodes] for first in range(0, len(weights), nodes)]


class DerivedCell(Cell[dict[nn.Module, Term]]):
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

    def begin(self, s0: Source) -> Begun[dict[nn.Module, Term]]:
        x, ways = s0.rectify()
        operations = self._chosen(_EDGES_FROM["i1"])
        norms: dict[nn.Module, nn.Module | None] = {}

        def maps(x: Tensor) -> list[Tensor]:
            leaving = self._leave(self.preprocess0.of_rectified(x), operations)
            norms.update({operation: norm for operation, (_, norm) in leaving.items()})
            return [leaving[operation][0] for operation in operations]

        def terms(maps: Sequence[Tensor]) -> dict[nn.Module, Term]:
            every = zip(operations, maps, strict=True)
            return {operation: (y, norms[operation]) for operation, y in every}

        return Begun(Part(maps, [x], [self.preprocess0, *operations]), ways, terms)

    def end(
        self,
        s1: Source,
        terms: Callable[[Sequence[Tensor]], dict[nn.Module, Term]],
        maps: Sequence[Tensor],
        *choice: Any,
    ) -> Work:
        """choice: nothing."""
        x, ways = s1.rectify()
        operations = {node: self._chosen(_EDGES_FROM[node]) for node in ("i2", "x1")}

        def halves(x: Tensor, *maps: Tensor) -> list[Tensor]:
            i2 = self.preprocess1.of_rectified(x)
            arriving = terms(maps) | self._leave(i2, operations["i2"])
            x1 = Source(self._node("x1", arriving, i2))
            arriving |= chosen_terms(x1, operations["x1"])
            x2 = self._node("x2", arriving, i2)
            return [x1.plain(), x2]

        modules = [self.preprocess1, *operations["i2"], *operations["x1"]]
        return Work(Part(halves, [x, *maps], modules), ways)

    def _chosen(self, edges: Sequence[int]) -> list[nn.Module]:
        """The operations of those of the edges that have one."""
        return [self.edges[str(edge)] for edge in edges if str(edge) in self.edges]

    def _leave(self, x: Tensor, operations: Sequence[nn.Module]) -> dict[nn.Module, Term]:
        """What the operations that leave an input node bring to their ends; x: its map."""
        return chosen_terms(leaving_source(x, operations), operations)

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

"""The mixed operation: every candidate of an edge, weighted by one row of Z (equation 3).

Candidates are computed up to their batch norms, those of all edges that leave a node together, and
of several nodes where these are there at once. The batch norms and the weighted sum of all edges
that end in a node are then one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from torch import Tensor, nn

from lgcnet_fast.nn.primitives import (
    DepthwiseSeparable,
    GlobalPool,
    ReLUConvBN,
    SeparablePair,
    Source,
    raw_convolutions,
)
from lgcnet_fast.ops import (
    Recomputable,
    mixed_norm_sum,
    recomputed,
    second_stages,
    separable_branches,
)


@dataclass(frozen=True)
class Terms:
    """What an edge brings to the node where it ends, in option order."""

    maps: list[Tensor]
    """(N, C, H, W), or stacks (B, N, C, H, W) of neighbouring candidates."""
    norms: list[nn.Module | None]
    """One a candidate; none where its map counts as it is."""
    options: tuple[int, ...]
    """Positions of the candidates in the edge's row of Z."""
    recomputable: list[Recomputable]
    """Those of the maps that the node need not keep."""


class MixedOp(nn.Module):
    """Candidates in option order. One that is None (`none`) adds nothing and is not computed."""

    def __init__(self, candidates: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict({k: op for k, op in candidates.items() if op is not None})
        self.options = tuple(i for i, op in enumerate(candidates.values()) if op is not None)
        # Neighbouring depthwise-separable candidates go on as one stack.
        names = groupby(self.candidates, lambda name: _is_branch(self.candidates[name]) or name)
        self._runs = tuple(tuple(run) for _, run in names)

    def forward(self, weights: Tensor, x: Tensor, *inputs: object) -> Tensor:
        """weights: (options,), one row of Z; x, inputs: what the candidates take."""
        return node_sum(edge_terms([(Source(x), [self])], *inputs), weights[None])

    def runs(self) -> Iterator[list[nn.Module]]:
        """The candidates, those of a stack together."""
        for names in self._runs:
            yield [self.candidates[name] for name in names]

    def terms(
        self, source: Source, computed: Mapping[nn.Module, list[Tensor]], *inputs: object
    ) -> Terms:
        """computed: the raw maps of runs that are there already, by their first candidate."""
        maps: list[Tensor] = []
        norms: list[nn.Module | None] = []
        pools = [one.bins for one in self.candidates.values() if isinstance(one, GlobalPool)]
        if pools:
            source.average(pools)
        for run in self.runs():
            norms += [getattr(candidate, "norm", None) for candidate in run]
            if run[0] in computed:
                maps += computed[run[0]]
            elif isinstance(run[0], nn.Identity):
                maps.append(source.plain())
            else:
                raw = cast(Callable[..., Tensor], run[0].raw)
                maps.append(raw(source, *inputs))
        return Terms(maps, norms, self.options, source.recomputable)


Leaving = tuple[Source, Sequence[MixedOp]]
"""The map of a node, and the edges that leave it."""


def edge_terms(leaving: Sequence[tuple[Source, Sequence[MixedOp]]], *inputs: object) -> list[Terms]:
    """The terms of all edges that leave some nodes, node after node.

    All nodes have as many edges, and all edges the same candidates.
    """
    computed = _separable_maps(leaving) | _convolved_maps(leaving)
    return [edge.terms(source, computed, *inputs) for source, edges in leaving for edge in edges]


def node_sum(edges: Sequence[Terms], z: Tensor) -> Tensor:
    """The map of a node: all terms of the edges that end there; z: (edges, options)."""
    options = z.shape[1]
    with recomputed(*(one for terms in edges for one in terms.recomputable)):
        return mixed_norm_sum(
            [y for terms in edges for y in terms.maps],
            z.flatten(),
            [norm for terms in edges for norm in terms.norms],
            [row * options + option for row, terms in enumerate(edges) for option in terms.options],
        )


def _separable_maps(leaving: Sequence[Leaving]) -> dict[nn.Module, list[Tensor]]:
    """The raw maps of all depthwise-separable candidates, by the first of each run."""
    edges = [edge for _, edges in leaving for edge in edges]
    runs = [run for edge in edges for run in edge.runs() if _is_separable(run[0])]
    if not runs:
        return {}
    firsts = [_first_stages(run) for run in runs]
    branches = [branch for first in firsts for branch in first]
    stacks = separable_branches(
        [source.plain() for source, _ in leaving],
        [branch.depthwise.weight for branch in branches],
        [branch.pointwise.weight for branch in branches],
        [branch.depthwise.dilation[0] for branch in branches[: len(branches) // len(edges)]],
        branches[0].depthwise.stride[0],
        [len(first) for first in firsts],
    )
    computed = {run[0]: stack for run, stack in zip(runs, stacks, strict=True)}
    return computed | _second_stages(computed)


def _second_stages(computed: Mapping[nn.Module, list[Tensor]]) -> dict[nn.Module, list[Tensor]]:
    """computed: the raw maps of first stages, of pairs among them."""
    pairs = {pair: pair.stages() for pair in computed if isinstance(pair, SeparablePair)}
    if not pairs:
        return {}
    stacks = second_stages(
        [computed[pair] for pair in pairs],
        [first.norm for first, _ in pairs.values()],
        [second.depthwise.weight for _, second in pairs.values()],
        [second.pointwise.weight for _, second in pairs.values()],
    )
    return dict(zip(pairs, stacks, strict=True))


def _convolved_maps(leaving: Sequence[Leaving]) -> dict[nn.Module, list[Tensor]]:
    """The raw maps of all plain convolutions, by candidate."""
    sources = {
        candidate: source
        for source, edges in leaving
        for edge in edges
        for candidate in edge.candidates.values()
        if isinstance(candidate, ReLUConvBN)
    }
    if not sources:
        return {}
    maps = raw_convolutions(list(sources), list(sources.values()))
    return {candidate: [y] for candidate, y in zip(sources, maps, strict=True)}


def _first_stages(run: list[nn.Module]) -> list[DepthwiseSeparable]:
    """What reads the edge's input."""
    if isinstance(run[0], SeparablePair):
        return [run[0].stages()[0]]
    return cast(list[DepthwiseSeparable], run)


def _is_separable(candidate: nn.Module) -> bool:
    return isinstance(candidate, (DepthwiseSeparable, SeparablePair))


def _is_branch(candidate: nn.Module) -> bool:
    return isinstance(candidate, DepthwiseSeparable)

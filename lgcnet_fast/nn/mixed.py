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

from lgcnet_fast.nn.primitives import DepthwiseSeparable, SeparablePair, Source
from lgcnet_fast.ops import Recomputable, mixed_norm_sum, recomputed, separable_branches
from lgcnet_fast.ops.second_stages import second_stages


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

    def terms(self, source: Source, stacks: Iterator[list[Tensor]], *inputs: object) -> Terms:
        """stacks: the raw maps of the edge's runs of depthwise-separable candidates."""
        maps: list[Tensor] = []
        norms: list[nn.Module | None] = []
        for run in self.runs():
            norms += [getattr(candidate, "norm", None) for candidate in run]
            if _is_separable(run[0]):
                maps += next(stacks)
            elif isinstance(run[0], nn.Identity):
                maps.append(source.plain())
            else:
                raw = cast(Callable[..., Tensor], run[0].raw)
                maps.append(raw(source, *inputs))
        return Terms(maps, norms, self.options, source.recomputable)


def edge_terms(leaving: Sequence[tuple[Source, Sequence[MixedOp]]], *inputs: object) -> list[Terms]:
    """The terms of all edges that leave some nodes, node after node.

    leaving: the map of each node and its edges, as many as those of the others and with the same
    candidates.
    """
    runs = [
        [run for run in edge.runs() if _is_separable(run[0])]
        for _, edges in leaving
        for edge in edges
    ]
    stacks = iter(_raw_stacks([source for source, _ in leaving], runs) if any(runs) else ())
    return [edge.terms(source, stacks, *inputs) for source, edges in leaving for edge in edges]


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


def _raw_stacks(
    sources: Sequence[Source], edges: Sequence[Sequence[list[nn.Module]]]
) -> list[list[Tensor]]:
    """The raw maps of every run of every edge, all computed together.

    edges: runs of depthwise-separable candidates, of as many edges for every source.
    """
    runs = [run for edge in edges for run in edge]
    firsts = [_first_stages(run) for run in runs]
    branches = [branch for first in firsts for branch in first]
    stacks = separable_branches(
        [source.plain() for source in sources],
        [branch.depthwise.weight for branch in branches],
        [branch.pointwise.weight for branch in branches],
        [branch.depthwise.dilation[0] for branch in branches[: len(branches) // len(edges)]],
        branches[0].depthwise.stride[0],
        [len(first) for first in firsts],
    )
    pairs = {
        index: run[0].stages()
        for index, run in enumerate(runs)
        if isinstance(run[0], SeparablePair)
    }
    if pairs:
        seconds = second_stages(
            [stacks[index] for index in pairs],
            [first.norm for first, _ in pairs.values()],
            [second.depthwise.weight for _, second in pairs.values()],
            [second.pointwise.weight for _, second in pairs.values()],
        )
        for index, maps in zip(pairs, seconds, strict=True):
            stacks[index] = maps
    return stacks


def _first_stages(run: list[nn.Module]) -> list[DepthwiseSeparable]:
    """What reads the edge's input."""
    if isinstance(run[0], SeparablePair):
        return [run[0].stages()[0]]
    return cast(list[DepthwiseSeparable], run)


def _is_separable(candidate: nn.Module) -> bool:
    return isinstance(candidate, (DepthwiseSeparable, SeparablePair))


def _is_branch(candidate: nn.Module) -> bool:
    return isinstance(candidate, DepthwiseSeparable)

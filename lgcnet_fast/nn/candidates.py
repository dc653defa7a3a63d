"""The raw maps of the candidates of all edges that leave some nodes: up to their batch norms.

What is computed alike is computed together, and what is not side by side (see together.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import cast

from torch import Tensor, nn

from lgcnet_fast.nn.primitives import (
    Deconvolution,
    DepthwiseSeparable,
    FactorizedReduce,
    GlobalPool,
    Interpolate,
    PoolBN,
    ReLUConvBN,
    SeparablePair,
    Source,
    raw_convolutions,
)
from lgcnet_fast.nn.together import Part, together
from lgcnet_fast.ops import second_stages, separable_branches

Run = Sequence[nn.Module]
"""A candidate, or neighbouring depthwise-separable ones, which go on as one stack."""
Leaving = Sequence[tuple[Source, Sequence[Sequence[Run]]]]
"""The map of each node, and the candidates of every edge that leaves it."""
Reading = tuple[Source, Sequence[Run]]
"""A map, and the candidates of an edge that read it."""


def raw_maps(leaving: Leaving, *inputs: object) -> dict[nn.Module, list[Tensor]]:
    """By the first candidate of a run: its maps, or a stack of them. Identities have none.

    All nodes have as many edges, and all edges the same candidates. inputs: what candidates take
    beside the map.
    """
    works = [
        work
        for kinds, compute in _KINDS
        if (work := _Work(kinds, compute, leaving, inputs)).candidates
    ]
    found = together([Part(work, work.maps(), work.candidates) for work in works])
    computed: dict[nn.Module, list[Tensor]] = {}
    for work, maps in zip(works, found, strict=True):
        computed |= work.by_candidate(maps)
    return computed


class _Work:
    """The candidates of some kinds of all edges."""

    def __init__(
        self,
        kinds: tuple[type[nn.Module], ...],
        compute: Callable[[list[Reading], Sequence[object]], list[list[Tensor]]],
        leaving: Leaving,
        inputs: Sequence[object],
    ) -> None:
        self._compute, self._inputs = compute, inputs
        self._sources = [source for source, _ in leaving]
        self._runs = [
            [[run for run in edge if isinstance(run[0], kinds)] for edge in edges]
            for _, edges in leaving
        ]
        every = [run for edges in self._runs for edge in edges for run in edge]
        self.candidates = [candidate for run in every for candidate in run]
        self._firsts = [run[0] for run in every]
        self._counts: list[int] = []

    def maps(self) -> list[Tensor]:
        """What is computed on."""
        return [source.plain() for source in self._sources]

    def __call__(self, *xs: Tensor) -> list[Tensor]:
        """The maps of all runs."""
        own = [Source(x) for x in xs]
        readings = [
            (source, edge) for source, edges in zip(own, self._runs, strict=True) for edge in edges
        ]
        found = self._compute(readings, self._inputs)
        for outer, source in zip(self._sources, own, strict=True):
            outer.recomputable += source.recomputable
        self._counts = [len(maps) for maps in found]
        return [y for maps in found for y in maps]

    def by_candidate(self, maps: Sequence[Tensor]) -> Iterator[tuple[nn.Module, list[Tensor]]]:
        """maps: what the call has given."""
        rest = iter(maps)
        for first, count in zip(self._firsts, self._counts, strict=True):
            yield first, list(islice(rest, count))


def _separable(readings: list[Reading], inputs: Sequence[object]) -> list[list[Tensor]]:
    """Depthwise-separable candidates and pairs of them."""
    runs = [run for _, edge in readings for run in edge]
    firsts = [_first_stages(run) for run in runs]
    branches = [branch for first in firsts for branch in first]
    stacks = separable_branches(
        [source.plain() for source in dict.fromkeys(source for source, _ in readings)],
        [branch.depthwise.weight for branch in branches],
        [branch.pointwise.weight for branch in branches],
        [branch.depthwise.dilation[0] for branch in branches[: len(branches) // len(readings)]],
        branches[0].depthwise.stride[0],
        [len(first) for first in firsts],
    )
    pairs = {
        at: run[0].stages() for at, run in enumerate(runs) if isinstance(run[0], SeparablePair)
    }
    if pairs:
        seconds = second_stages(
            [stacks[at] for at in pairs],
            [first.norm for first, _ in pairs.values()],
            [second.depthwise.weight for _, second in pairs.values()],
            [second.pointwise.weight for _, second in pairs.values()],
        )
        for at, maps in zip(pairs, seconds, strict=True):
            stacks[at] = maps
    return stacks


def _rectifying(readings: list[Reading], inputs: Sequence[object]) -> list[list[Tensor]]:
    """Candidates that begin with a ReLU and a convolution or an average of it."""
    maps: dict[nn.Module, Tensor] = {}
    convolutions = [
        (candidate, source)
        for source, candidate in _each(readings)
        if isinstance(candidate, ReLUConvBN)
    ]
    if convolutions:
        candidates, sources = zip(*convolutions, strict=True)
        found = Source.rectified_together(sources, partial(raw_convolutions, candidates))
        maps |= zip(candidates, found, strict=True)
    for source, edge in readings:
        bins = [run[0].bins for run in edge if isinstance(run[0], GlobalPool)]
        if bins:
            source.average(bins)
    for source, candidate in _each(readings):
        if candidate not in maps:
            maps[candidate] = _raw(candidate, source, inputs)
    return [[maps[candidate]] for _, candidate in _each(readings)]


def _plain(readings: list[Reading], inputs: Sequence[object]) -> list[list[Tensor]]:
    """Candidates that read the map as it is."""
    return [[_raw(candidate, source, inputs)] for source, candidate in _each(readings)]


_KINDS = (
    ((DepthwiseSeparable, SeparablePair), _separable),
    ((ReLUConvBN, FactorizedReduce, GlobalPool, Deconvolution), _rectifying),
    ((PoolBN, Interpolate), _plain),
)


def _raw(candidate: nn.Module, source: Source, inputs: Sequence[object]) -> Tensor:
    raw = cast(Callable[..., Tensor], candidate.raw)
    return raw(source, *inputs)


def _each(readings: Sequence[Reading]) -> Iterator[tuple[Source, nn.Module]]:
    """Single candidates and what they read."""
    for source, edge in readings:
        for (candidate,) in edge:
            yield source, candidate


def _first_stages(run: Run) -> list[DepthwiseSeparable]:
    """What reads the edge's input."""
    if isinstance(run[0], SeparablePair):
        return [run[0].stages()[0]]
    return [cast(DepthwiseSeparable, branch) for branch in run]

"""The raw maps of the candidates of all edges that leave a node: up to their batch norms.

What is computed alike is computed together, and what is not side by side (see together.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
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
)
from lgcnet_fast.nn.together import Part, together
from lgcnet_fast.ops import Products, second_stages, separable_branches
from lgcnet_fast.ops.maps import computed_dtype
from lgcnet_fast.ops.products import Entry
from lgcnet_fast.ops.recompute import Remembered, spares

Run = Sequence[nn.Module]
"""A candidate, or neighbouring depthwise-separable ones, which go on as one stack."""
Edges = Sequence[Sequence[Run]]
"""The candidates of each edge."""
Compute = Callable[[Source, Edges, Sequence[object]], Sequence[Sequence[Entry]]]
"""The maps of each run, from what `raw_maps` takes."""


@dataclass(frozen=True)
class Raw:
    """Of a run of candidates: what the norms receive, or the depthwise maps before that."""

    maps: list[Tensor]
    """One a candidate, or a stack of all."""
    multiplied: bool
    """Whether they have been through the last pointwise convolutions."""


def raw_maps(source: Source, edges: Edges, *inputs: object) -> dict[nn.Module, Raw]:
    """By the first candidate of a run. Identities have none.

    source: the map of the node; edges: they have the same candidates; inputs: what candidates take
    beside the map.
    """
    works = [_Work(source, edges, inputs, *kind) for kind in _kinds(source)]
    works = [work for work in works if work.candidates]
    found = together([Part(work, [source.plain()], work.candidates) for work in works])
    computed: dict[nn.Module, Raw] = {}
    for work, maps in zip(works, found, strict=True):
        computed |= work.by_candidate(maps)
    return computed


class _Work:
    """The candidates of some kinds of all edges."""

    def __init__(
        self,
        source: Source,
        edges: Edges,
        inputs: Sequence[object],
        kinds: tuple[type[nn.Module], ...],
        compute: Compute,
    ) -> None:
        self._source, self._inputs, self._compute = source, inputs, compute
        self._edges = [[run for run in edge if isinstance(run[0], kinds)] for edge in edges]
        self.candidates = [candidate for edge in self._edges for run in edge for candidate in run]
        self._multiplied: list[list[bool]] = []
        """Of each run's maps."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The maps of all runs: parts hand on tensors, and no parameters."""
        own = Source(x)
        found = self._compute(own, self._edges, self._inputs)
        self._source.recomputable += own.recomputable
        self._multiplied = [[isinstance(y, Tensor) for y in maps] for maps in found]
        every = [y for maps in found for y in maps]
        return [y.maps if isinstance(y, Products) else y for y in every]

    def by_candidate(self, maps: Sequence[Tensor]) -> Iterator[tuple[nn.Module, Raw]]:
        """maps: what the call has given."""
        rest = iter(maps)
        runs = (run for edge in self._edges for run in edge)
        for run, multiplied in zip(runs, self._multiplied, strict=True):
            yield run[0], Raw(list(islice(rest, len(multiplied))), all(multiplied))


def _separable(source: Source, edges: Edges, inputs: Sequence[object]) -> list[list[Entry]]:
    """Depthwise-separable candidates and pairs of them."""
    x = source.plain()
    if not spares(x):
        return _branches(x, edges)
    # Apart, as first stages are kept, and with them all that lies in the same memory.
    pairs, others = ([_of_kind(edge, kind) for edge in edges] for kind in (True, False))
    of_pairs, of_others = iter(_branches(source.plain(), pairs)), _branches(x, others)
    runs = [run for edge in others for run in edge]
    for (stack,), run in zip(of_others, runs, strict=True):
        source.recomputable.append((cast(Tensor, stack), _again(x, _first_stages(run))))
    rest = iter(of_others)
    return [next(of_pairs if _is_pair(run) else rest) for edge in edges for run in edge]


def _is_pair(run: Run) -> bool:
    return isinstance(run[0], SeparablePair)


def _of_kind(edge: Sequence[Run], pairs: bool) -> list[Run]:
    return [run for run in edge if _is_pair(run) == pairs]


def _branches(x: Tensor, edges: Edges) -> list[list[Entry]]:
    """Of each run, from the map of the node."""
    runs = [run for edge in edges for run in edge]
    if not runs:
        return []
    firsts = [_first_stages(run) for run in runs]
    branches = [branch for first in firsts for branch in first]
    stacks = separable_branches(
        x,
        [branch.depthwise.weight for branch in branches],
        [branch.pointwise.weight for branch in branches],
        [branch.depthwise.dilation[0] for branch in branches[: len(branches) // len(edges)]],
        branches[0].depthwise.stride[0],
        [len(first) for first in firsts],
        [_ends_in_a_node(run) for run in edges[0] for _ in run],
    )
    pairs = {at: run[0].stages() for at, run in enumerate(runs) if _is_pair(run)}
    if pairs:
        seconds = second_stages(
            [cast(list[Tensor], stacks[at]) for at in pairs],
            [first.norm for first, _ in pairs.values()],
            [second.depthwise.weight for _, second in pairs.values()],
            [second.pointwise.weight for _, second in pairs.values()],
            to_sum=True,
        )
        for at, maps in zip(pairs, seconds, strict=True):
            stacks[at] = maps
    return stacks


def _again(x: Tensor, branches: Sequence[DepthwiseSeparable]) -> Remembered:
    """How to compute the stack of these branches of x once more."""
    depthwise = [branch.depthwise.weight.detach() for branch in branches]
    pointwise = [branch.pointwise.weight.detach() for branch in branches]
    dilations = [branch.depthwise.dilation[0] for branch in branches]
    stride = branches[0].depthwise.stride[0]
    enabled, dtype = torch.is_autocast_enabled(x.device.type), computed_dtype(x)

    @torch.no_grad()
    def compute(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled):
            ((stack,),) = separable_branches(x, depthwise, pointwise, dilations, stride)
        return cast(Tensor, stack)

    return Remembered(compute, x)


def _rectifying(source: Source, edges: Edges, inputs: Sequence[object]) -> list[list[Tensor]]:
    """Candidates that begin with a ReLU and a convolution or an average of it."""
    every = _single(edges)
    convolutions = [one for one in every if isinstance(one, ReLUConvBN)]
    maps: dict[nn.Module, Tensor] = {}
    if convolutions:
        found = source.convolved([one.layer for one in convolutions])
        maps |= zip(convolutions, found, strict=True)
    for edge in edges:
        others = [[run[0]] for run in edge if run[0] not in maps]
        maps |= zip((one for (one,) in others), _alone(source, others, inputs), strict=True)
    return [[maps[one]] for one in every]


def _plain(source: Source, edges: Edges, inputs: Sequence[object]) -> list[list[Tensor]]:
    """Candidates that read the map, not a ReLU that others read too."""
    return [[y] for edge in edges for y in _alone(source, edge, inputs)]


def _alone(source: Source, edge: Sequence[Run], inputs: Sequence[object]) -> list[Tensor]:
    """Of runs of one, whose averages are taken together."""
    bins = [run[0].bins for run in edge if isinstance(run[0], GlobalPool)]
    if bins:
        source.average(bins)
    return [_raw(run[0], source, inputs) for run in edge]


def _kinds(source: Source) -> list[tuple[tuple[type[nn.Module], ...], Compute]]:
    """Candidates that are computed together, and how."""
    plain: tuple[type[nn.Module], ...] = (PoolBN, Interpolate)
    rectifying: tuple[type[nn.Module], ...] = (ReLUConvBN, FactorizedReduce, Deconvolution)
    if source.averages_itself:  # Many short launches, beside the convolutions.
        plain += (GlobalPool,)
    else:
        rectifying += (GlobalPool,)
    return [
        ((DepthwiseSeparable, SeparablePair), _separable),
        (rectifying, _rectifying),
        (plain, _plain),
    ]


def _raw(candidate: nn.Module, source: Source, inputs: Sequence[object]) -> Tensor:
    raw = cast(Callable[..., Tensor], candidate.raw)
    return raw(source, *inputs)


def _single(edges: Edges) -> list[nn.Module]:
    """The candidates of runs of one."""
    return [candidate for edge in edges for (candidate,) in edge]


def _ends_in_a_node(run: Run) -> bool:
    """Whether what reads the edge's input goes to the node alone, in a way that kernels serve."""
    shared = any(isinstance(one.norm, nn.SyncBatchNorm) for one in run)
    return not isinstance(run[0], SeparablePair) and not shared


def last_pointwise(candidate: nn.Module) -> nn.Conv2d:
    """The pointwise convolution that ends a depthwise-separable candidate or a pair of them."""
    one = candidate.stages()[1] if isinstance(candidate, SeparablePair) else candidate
    return cast(DepthwiseSeparable, one).pointwise


def _first_stages(run: Run) -> list[DepthwiseSeparable]:
    """What reads the edge's input."""
    if isinstance(run[0], SeparablePair):
        return [run[0].stages()[0]]
    return [cast(DepthwiseSeparable, branch) for branch in run]

"""The mixed operation: every candidate of an edge, weighted by one row of Z (equation 3).

Candidates are computed up to their batch norms, those of all edges that leave a node together, and
of several nodes where these are there at once. The batch norms and the weighted sum of all edges
that end in a node are then one operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor, nn

from lgcnet_fast.nn.candidates import Raw, last_pointwise, raw_maps
from lgcnet_fast.nn.primitives import DepthwiseSeparable, SeparablePair, Source
from lgcnet_fast.ops import Products, Recomputable, mixed_norm_sum, recomputed
from lgcnet_fast.ops.constants import constant
from lgcnet_fast.ops.products import Entry

_SEPARABLE = (DepthwiseSeparable, SeparablePair)
ALIGNMENT = 8
"""Numbers: at least 16 bytes."""


@dataclass(frozen=True)
class Terms:
    """What an edge brings to the node where it ends, in option order."""

    maps: list[Tensor]
    """(N, C, H, W), or stacks (B, N, C, H, W) of neighbouring candidates."""
    pointwise: list[Sequence[nn.Conv2d]]
    """Of each of the maps: convolutions that are yet to come, one a candidate; mostly none."""
    norms: list[nn.Module | None]
    """One a candidate; none where its map counts as it is."""
    kinds: list[int]
    """One a candidate, see `MixedOp.kinds`."""
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
        (weights,) = node_weights([[self]], weights[None])
        return node_sum(edge_terms(Source(x), [self], *inputs), weights)

    def norms(self) -> list[nn.Module | None]:
        """The batch norm of each candidate; None where its map counts as it is."""
        return [getattr(candidate, "norm", None) for candidate in self.candidates.values()]

    def kinds(self) -> list[int]:
        """Of each candidate: 0 where it ends in a pointwise product, so that nodes can take it as a
        depthwise map, 2 where its map counts as it is, else 1. Nodes order their weights so."""
        return [
            2 if norm is None else 0 if isinstance(candidate, _SEPARABLE) else 1
            for candidate, norm in zip(self.candidates.values(), self.norms(), strict=True)
        ]

    def runs(self) -> Iterator[list[nn.Module]]:
        """The candidates, those of a stack together."""
        for names in self._runs:
            yield [self.candidates[name] for name in names]

    def terms(self, source: Source, computed: Mapping[nn.Module, Raw]) -> Terms:
        """computed: of the candidates, as `raw_maps` gives it."""
        maps: list[Tensor] = []
        pointwise: list[Sequence[nn.Conv2d]] = []
        for run in self.runs():
            is_identity = isinstance(run[0], nn.Identity)
            raw = Raw([source.plain()], True) if is_identity else computed[run[0]]
            maps += raw.maps
            layers = [] if raw.multiplied else [last_pointwise(one) for one in run]
            pointwise += [layers] * len(raw.maps)
        return Terms(maps, pointwise, self.norms(), self.kinds(), source.recomputable)


def edge_terms(source: Source, edges: Sequence[MixedOp], *inputs: object) -> list[Terms]:
    """The terms of all edges that leave a node, which have the same candidates.

    source: the map of the node; inputs: what candidates take beside it.
    """
    computed = raw_maps(source, [list(edge.runs()) for edge in edges], *inputs)
    return [edge.terms(source, computed) for edge in edges]


def node_weights(nodes: Sequence[Sequence[MixedOp]], z: Tensor) -> list[Tensor]:
    """What `node_sum` takes for each of several nodes, picked from Z at once.

    nodes: the edges that end in each; z: (edges of all nodes, options).
    """
    picked: list[tuple[int, ...]] = []
    first = 0
    for edges in nodes:
        found = [
            (kind, row * z.shape[1] + option)
            for row, edge in enumerate(edges, start=first)
            for option, kind in zip(edge.options, edge.kinds(), strict=True)
        ]
        picked.append(tuple(position for _, position in sorted(found)))
        first += len(edges)
    if picked == [tuple(range(z.numel()))]:
        return [z.flatten()]
    return list(_Picked.apply(z.flatten(), picked))


class _Picked(torch.autograd.Function):
    """Elements of a vector at several lists of positions: one launch.

    The gradient takes one as well where a single list has them all, else three.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, picked: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        ctx.size, ctx.positions = len(z), sum(picked, ())
        # Kernels are compiled anew for vectors that do not begin at multiples of 16 bytes.
        padded = [positions + (0,) * (-len(positions) % ALIGNMENT) for positions in picked]
        together = z.index_select(0, constant(sum(padded, ()), z.device))
        parts = together.split([len(positions) for positions in padded])
        return tuple(part[: len(own)] for part, own in zip(parts, picked, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        together = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        if sorted(ctx.positions) == list(range(ctx.size)):
            back = tuple(map(ctx.positions.index, range(ctx.size)))
            return together.index_select(0, constant(back, together.device)), None
        positions = constant(ctx.positions, together.device)
        return together.new_zeros(ctx.size).index_copy_(0, positions, together), None


def node_sum(edges: Sequence[Terms], weights: Tensor) -> Tensor:
    """The map of a node: all terms of the edges that end there.

    weights: one a term, by their kinds, which is how they are summed.
    """
    kinds = [kind for terms in edges for kind in terms.kinds]
    positions = [count(sum(other < kind for other in kinds)) for kind in range(3)]
    with recomputed(*(one for terms in edges for one in terms.recomputable)):
        return mixed_norm_sum(
            [y for terms in edges for y in _entries(terms)],
            weights,
            [norm for terms in edges for norm in terms.norms],
            [next(positions[kind]) for kind in kinds],
        )


def _entries(terms: Terms) -> list[Entry]:
    """The maps, with the weights of the convolutions that are yet to come."""
    return [
        Products(y, [layer.weight for layer in layers]) if layers else y
        for y, layers in zip(terms.maps, terms.pointwise, strict=True)
    ]


def _is_branch(candidate: nn.Module) -> bool:
    return isinstance(candidate, DepthwiseSeparable)

"""The operations of a derived network's cell, computed up to the sums at their nodes.

As for the candidates of the supernet (see mixed.py), those that leave a node are computed together,
and the batch norms that end in a node are part of its sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lgcnet_fast.nn.primitives import (
    DepthwiseSeparable,
    FactorizedReduce,
    ReLUConvBN,
    SeparablePair,
    Source,
    raw_convolutions,
)
from lgcnet_fast.nn.together import Part, together
from lgcnet_fast.ops import Recomputable, max_pool, norm_sum, recomputed, separable_branches

Term = tuple[Tensor, nn.Module | None]
"""A map, and the batch norm that it still goes through, if any."""
Work = tuple[Sequence[nn.Module], Part]
"""Operations, and what computes the raw map of each."""


def leaving_source(x: Tensor, operations: Sequence[nn.Module]) -> Source:
    """Of the map x, which only these operations read."""
    rectifying = (ReLUConvBN, FactorizedReduce)
    return Source(x, only_rectified=all(isinstance(one, rectifying) for one in operations))


def chosen_terms(source: Source, operations: Sequence[nn.Module]) -> dict[nn.Module, Term]:
    """What each of the operations that leave a node brings to its end; source: the node's map."""
    ways: list[Recomputable] = []
    works = [
        *_rectifying(source, operations, ways),
        *_separable(source, operations),
        *_pooled(source, operations),
    ]
    with recomputed(*ways):
        found = together([part for _, part in works])
    raw = {
        operation: y
        for (own, _), maps in zip(works, found, strict=True)
        for operation, y in zip(own, maps, strict=True)
    }
    return {
        one: (raw[one] if one in raw else source.plain(), getattr(one, "norm", None))
        for one in operations
    }


def term_sum(terms: Sequence[Term]) -> Tensor:
    """The map of a node."""
    maps, norms = zip(*terms, strict=True)
    return norm_sum(maps, norms)


def _rectifying(
    source: Source, operations: Sequence[nn.Module], ways: list[Recomputable]
) -> Iterator[Work]:
    """Plain convolutions, and reductions; ways: gets how to compute again what they read."""

    def rectified() -> Tensor:
        value, own = source.rectify()
        ways.extend(own)
        return value

    convolutions = [one for one in operations if isinstance(one, ReLUConvBN)]
    if convolutions:
        maps = [rectified() for _ in convolutions]
        yield convolutions, Part(lambda *xs: raw_convolutions(convolutions, xs), maps, convolutions)
    for one in operations:
        if isinstance(one, FactorizedReduce):
            yield [one], Part(lambda x, one=one: [one.convolved(x)], [rectified()], [one])


def _separable(source: Source, operations: Sequence[nn.Module]) -> Iterator[Work]:
    """Depthwise-separable operations, whose maps are of one shape."""
    found = [one for one in operations if isinstance(one, (DepthwiseSeparable, SeparablePair))]
    if not found:
        return
    firsts = [one.stages()[0] if isinstance(one, SeparablePair) else one for one in found]
    layers = [first.depthwise for first in firsts]

    def compute(x: Tensor) -> list[Tensor]:
        stacks: list[list[Any]] = separable_branches(
            x,
            [layer.weight for layer in layers],
            [first.pointwise.weight for first in firsts],
            [layer.dilation[0] for layer in layers],
            layers[0].stride[0],
            [1] * len(found),
        )
        return [
            one.second(y) if isinstance(one, SeparablePair) else y
            for one, (y,) in zip(found, stacks, strict=True)
        ]

    yield found, Part(compute, [source.plain()], found)


def _pooled(source: Source, operations: Sequence[nn.Module]) -> Iterator[Work]:
    """Max pooling, once for all operations, which have the stride of the edges that leave."""
    found = [one for one in operations if isinstance(one, nn.MaxPool2d)]
    if not found:
        return
    first = found[0]

    def compute(x: Tensor) -> list[Tensor]:
        pooled = max_pool(x, cast(int, first.stride)) if first.training else first(x)
        return [pooled] * len(found)

    yield found, Part(compute, [source.plain()])

"""The operations of a derived network's cell, computed up to the sums at their nodes.

As for the candidates of the supernet (see mixed.py), those that leave a node are computed together,
and the batch norms that end in a node are part of its sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

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


def chosen_terms(leaving: Mapping[nn.Module, Source]) -> dict[nn.Module, Term]:
    """What each operation brings to its node; leaving: the map that it reads."""
    ways: list[Recomputable] = []
    works = [
        *_rectifying(leaving, ways),
        *_separable(leaving),
        *_pooled(leaving),
    ]
    with recomputed(*ways):
        found = together([part for _, part in works])
    raw = {
        operation: y
        for (operations, _), maps in zip(works, found, strict=True)
        for operation, y in zip(operations, maps, strict=True)
    }
    return {
        operation: (
            raw[operation] if operation in raw else source.plain(),
            getattr(operation, "norm", None),
        )
        for operation, source in leaving.items()
    }


def term_sum(terms: Sequence[Term]) -> Tensor:
    """The map of a node."""
    maps, norms = zip(*terms, strict=True)
    return norm_sum(maps, norms)


def _rectifying(leaving: Mapping[nn.Module, Source], ways: list[Recomputable]) -> Iterator[Work]:
    """Plain convolutions, and reductions; ways: gets how to compute again what they read."""
    convolutions = [one for one in leaving if isinstance(one, ReLUConvBN)]
    reductions = [one for one in leaving if isinstance(one, FactorizedReduce)]
    if convolutions:
        maps = [_rectified(leaving[one], ways) for one in convolutions]
        yield convolutions, Part(lambda *xs: raw_convolutions(convolutions, xs), maps, convolutions)
    for one in reductions:
        x = _rectified(leaving[one], ways)
        yield [one], Part(lambda x, one=one: [one.convolved(x)], [x], [one])


def _rectified(source: Source, ways: list[Recomputable]) -> Tensor:
    value, own = source.rectify()
    ways += own
    return value


def _separable(leaving: Mapping[nn.Module, Source]) -> Iterator[Work]:
    """Depthwise-separable operations, whose maps are of one shape."""
    found = [one for one in leaving if isinstance(one, (DepthwiseSeparable, SeparablePair))]
    if not found:
        return
    # Map after map, whatever the order of the edges.
    sources = list(dict.fromkeys(leaving[one] for one in found))
    found.sort(key=lambda one: sources.index(leaving[one]))
    firsts = [one.stages()[0] if isinstance(one, SeparablePair) else one for one in found]
    layers = [first.depthwise for first in firsts]
    shares = [sum(leaving[one] is source for one in found) for source in sources]

    def compute(*xs: Tensor) -> list[Tensor]:
        stacks = separable_branches(
            xs,
            [layer.weight for layer in layers],
            [first.pointwise.weight for first in firsts],
            [layer.dilation[0] for layer in layers],
            layers[0].stride[0],
            [1] * len(found),
            shares,
        )
        return [
            one.second(y) if isinstance(one, SeparablePair) else y
            for one, (y,) in zip(found, stacks, strict=True)
        ]

    yield found, Part(compute, [source.plain() for source in sources], found)


def _pooled(leaving: Mapping[nn.Module, Source]) -> Iterator[Work]:
    """Max pooling, once for all operations that pool a map alike."""
    alike: dict[tuple[Source, int], list[nn.Module]] = {}
    for one, source in leaving.items():
        if isinstance(one, nn.MaxPool2d):
            alike.setdefault((source, cast(int, one.stride)), []).append(one)
    for (source, stride), operations in alike.items():

        def compute(
            x: Tensor, stride: int = stride, operations: Sequence[nn.Module] = operations
        ) -> list[Tensor]:
            pooled = max_pool(x, stride) if operations[0].training else operations[0](x)
            return [pooled] * len(operations)

        yield operations, Part(compute, [source.plain()])

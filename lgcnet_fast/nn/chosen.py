"""The operations of a derived network's cell, computed up to the sums at their nodes.

As for the candidates of the supernet (see mixed.py), those that leave a node are computed together,
and the batch norms that end in a node are part of its sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from lgcnet_fast.ops import max_pool, norm_sum, separable_branches

Term = tuple[Tensor, nn.Module | None]
"""A map, and the batch norm that it still goes through, if any."""


def leaving_source(x: Tensor, operations: Sequence[nn.Module]) -> Source:
    """Of the map x, which only these operations read."""
    rectifying = (ReLUConvBN, FactorizedReduce)
    return Source(x, only_rectified=all(isinstance(one, rectifying) for one in operations))


def chosen_terms(leaving: Mapping[nn.Module, Source]) -> dict[nn.Module, Term]:
    """What each operation brings to its node; leaving: the map that it reads."""
    raw = _convolved(leaving) | _separable(leaving)
    terms: dict[nn.Module, Term] = {}
    for operation, source in leaving.items():
        if operation in raw:
            terms[operation] = raw[operation], cast(nn.Module, operation.norm)
        elif isinstance(operation, nn.MaxPool2d):
            terms[operation] = _pooled(source, operation), None
        elif isinstance(operation, nn.Identity):
            terms[operation] = source.plain(), None
        else:
            compute = cast(Callable[[Source], Tensor], operation.raw)
            terms[operation] = compute(source), cast(nn.Module, operation.norm)
    return terms


def term_sum(terms: Sequence[Term]) -> Tensor:
    """The map of a node."""
    maps, norms = zip(*terms, strict=True)
    return norm_sum(maps, norms)


def _convolved(leaving: Mapping[nn.Module, Source]) -> dict[nn.Module, Tensor]:
    """The raw maps of plain convolutions."""
    found = [operation for operation in leaving if isinstance(operation, ReLUConvBN)]
    if not found:
        return {}
    maps = raw_convolutions(found, [leaving[operation] for operation in found])
    return dict(zip(found, maps, strict=True))


def _separable(leaving: Mapping[nn.Module, Source]) -> dict[nn.Module, Tensor]:
    """The raw maps of depthwise-separable operations, whose maps are of one shape."""
    found = [one for one in leaving if isinstance(one, (DepthwiseSeparable, SeparablePair))]
    if not found:
        return {}
    # Map after map, whatever the order of the edges.
    sources = list(dict.fromkeys(leaving[one] for one in found))
    found.sort(key=lambda one: sources.index(leaving[one]))
    firsts = [one.stages()[0] if isinstance(one, SeparablePair) else one for one in found]
    layers = [first.depthwise for first in firsts]
    stacks = separable_branches(
        [source.plain() for source in sources],
        [layer.weight for layer in layers],
        [first.pointwise.weight for first in firsts],
        [layer.dilation[0] for layer in layers],
        layers[0].stride[0],
        [1] * len(found),
        [sum(leaving[one] is source for one in found) for source in sources],
    )
    return {
        one: one.second(y) if isinstance(one, SeparablePair) else y
        for one, (y,) in zip(found, stacks, strict=True)
    }


def _pooled(source: Source, operation: nn.MaxPool2d) -> Tensor:
    """Max pooling, once for all operations that pool a map alike."""
    stride = cast(int, operation.stride)
    if stride not in source.pooled:
        x = source.plain()
        source.pooled[stride] = max_pool(x, stride) if operation.training else operation(x)
    return source.pooled[stride]

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
    """The raw maps of depthwise-separable operations, those that read a map together."""
    by_source: dict[Source, dict[nn.Module, DepthwiseSeparable]] = {}
    for operation, source in leaving.items():
        if isinstance(operation, (DepthwiseSeparable, SeparablePair)):
            first = operation.stages()[0] if isinstance(operation, SeparablePair) else operation
            by_source.setdefault(source, {})[operation] = first
    raw: dict[nn.Module, Tensor] = {}
    for source, firsts in by_source.items():
        layers = [first.depthwise for first in firsts.values()]
        stacks = separable_branches(
            source.plain(),
            [layer.weight for layer in layers],
            [first.pointwise.weight for first in firsts.values()],
            [layer.dilation[0] for layer in layers],
            layers[0].stride[0],
            [1] * len(layers),
        )
        for operation, (y,) in zip(firsts, stacks, strict=True):
            pair = isinstance(operation, SeparablePair)
            raw[operation] = operation.second(y) if pair else y
    return raw


def _pooled(source: Source, operation: nn.MaxPool2d) -> Tensor:
    """Max pooling, once for all operations that pool a map alike."""
    stride = cast(int, operation.stride)
    if stride not in source.pooled:
        x = source.plain()
        source.pooled[stride] = max_pool(x, stride) if operation.training else operation(x)
    return source.pooled[stride]

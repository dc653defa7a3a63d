"""From a derived network to its folded form: same function, nothing left that costs for nothing.

Batch norms disappear into convolutions; `none` edges, nodes that nothing reads and everything in
front of them are dropped. A node that no operation reaches is zero: it is not stored, and the
weights that would multiply it are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from torch import Tensor, nn

from lgcnet_fast.deploy.fold_modules import fold_module, fold_stem_stage, is_one_operation
from lgcnet_fast.deploy.operations import (
    Concatenation,
    Constant,
    FoldedOperation,
    MaxPooling,
    Resizing,
    Sum,
)
from lgcnet_fast.deploy.program import IMAGE, FoldedNetwork, Step
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.nn.cell import CELL_EDGES, DerivedCell
from lgcnet_fast.nn.fusion import FusionCell
from lgcnet_fast.nn.heads import ASPP, PPM
from lgcnet_fast.nn.stem import Stem
from lgcnet_fast.space.networks import Backbone, DerivedNetwork


def fold(network: nn.Module) -> FoldedNetwork:
    """The inference network of `network`, with weights of its own, on its device, in its dtype.

    Equal to `network.eval()` up to rounding, for every input size. Raises `ConfigError` for
    networks of search spaces that do not build LGCNet's derived networks.
    """
    if not folds(network):
        raise ConfigError(
            f"only networks of the spaces lgcnet and gas can be deployed, not a "
            f"{type(network).__name__}"
        )
    assert isinstance(network.backbone, Backbone)
    folding = _Folding()
    features = _backbone(folding, network.backbone)
    neck = network.neck
    if isinstance(neck, FusionCell):
        fused = _fusion_cell(folding, neck, features)
    elif isinstance(neck, ASPP | PPM):
        fused = _pyramid(folding, neck, features[-1])
    else:
        fused = folding.apply("neck", neck, features[-1], features[-1].stride)
    folding.apply("classifier", network.classifier, fused, fused.stride)
    return FoldedNetwork(folding.steps)


def folds(network: nn.Module) -> TypeGuard[DerivedNetwork]:
    """Whether `fold` takes it: networks of plug-in spaces may be of any kind."""
    return isinstance(network, DerivedNetwork) and isinstance(network.backbone, Backbone)


@dataclass(frozen=True)
class _Map:
    """A feature map of the derived network, and which part of it is computed."""

    name: str
    stride: int
    channels: int
    kept: tuple[int, ...]
    """Channels that the computed map has; the others are zero everywhere."""


class _Folding:
    """Records the steps that compute the maps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.image = _Map(IMAGE, stride=1, channels=3, kept=(0, 1, 2))

    def apply(self, name: str, module: nn.Module, x: _Map, stride: int) -> _Map:
        """What `module` makes of `x`; stride: that of the result."""
        if isinstance(module, nn.Identity):
            return x
        if isinstance(module, nn.Sequential) and not is_one_operation(module):
            for index, part in enumerate(module):
                x = self.apply(f"{name}/{index}", part, x, stride)
            return x
        operation = fold_module(module, list(x.kept))
        if isinstance(operation, MaxPooling | Resizing):
            return self._channelwise(name, operation, x, stride)
        if not x.kept:
            return self.record(name, Constant(_bias(operation)), [self.image], stride)
        return self.record(name, operation, [x], stride)

    def record(
        self, name: str, operation: FoldedOperation, inputs: Sequence[_Map], stride: int
    ) -> _Map:
        """A step whose operation has a bias, and so tells the channels of its map."""
        self._append(name, operation, inputs, stride)
        channels = len(_bias(operation))
        return _Map(name, stride, channels, tuple(range(channels)))

    def add(self, name: str, terms: Sequence[_Map], like: _Map) -> _Map:
        """The sum of maps of one shape, that of `like`; of no terms: zero."""
        computed = [term for term in terms if term.kept]
        if not computed:
            return replace(like, name=name, kept=())
        if len(computed) > 1:
            self._append(name, Sum(), computed, like.stride)
            return replace(computed[0], name=name)
        return computed[0]

    def concatenate(self, name: str, parts: Sequence[_Map]) -> _Map:
        """Along channels; the parts have one stride."""
        kept: list[int] = []
        channels = 0
        for part in parts:
            kept += [channels + channel for channel in part.kept]
            channels += part.channels
        computed = [part for part in parts if part.kept]
        if len(computed) == 1:
            name = computed[0].name
        elif computed:
            self._append(name, Concatenation(), computed, parts[0].stride)
        return _Map(name, parts[0].stride, channels, tuple(kept))

    def resize(self, name: str, x: _Map, stride: int) -> _Map:
        return x if x.stride == stride else self._channelwise(name, Resizing(), x, stride)

    def _channelwise(self, name: str, operation: FoldedOperation, x: _Map, stride: int) -> _Map:
        """An operation that takes zeros to zeros, channel by channel."""
        if x.kept:
            self._append(name, operation, [x], stride)
        return replace(x, name=name, stride=stride)

    def _append(
        self, name: str, operation: FoldedOperation, inputs: Sequence[_Map], stride: int
    ) -> None:
        self.steps.append(Step(name, operation, tuple(x.name for x in inputs), stride))


def _bias(operation: FoldedOperation) -> Tensor:
    return operation.get_parameter("bias").detach()


def _backbone(folding: _Folding, backbone: Backbone) -> list[_Map]:
    """The outputs of the tapped cells, finest first."""
    s0, s1 = _stem(folding, backbone.stem)
    features = []
    for k, cell in enumerate(backbone.cells):
        assert isinstance(cell, DerivedCell)
        s0, s1 = s1, _cell(folding, f"cell{k}", cell, s0, s1)
        if k in backbone.taps:
            features.append(s1)
    return features


def _stem(folding: _Folding, stem: Stem) -> tuple[_Map, _Map]:
    maps = [folding.image]
    for index, stage in enumerate((stem.conv1, stem.conv2, stem.conv3), start=1):
        convolution = fold_stem_stage(stage)
        stride = maps[-1].stride * convolution.stride
        maps.append(folding.record(f"stem/conv{index}", convolution, [maps[-1]], stride))
    return maps[-2], maps[-1]


def _cell(folding: _Folding, name: str, cell: DerivedCell, s0: _Map, s1: _Map) -> _Map:
    nodes = {
        "i1": folding.apply(f"{name}/preprocess0", cell.preprocess0, s0, s1.stride),
        "i2": folding.apply(f"{name}/preprocess1", cell.preprocess1, s1, s1.stride),
    }
    like = replace(nodes["i2"], stride=s1.stride * cell.stride)
    for node in ("x1", "x2"):
        terms = [
            folding.apply(
                f"{name}/{source}-{node}", cell.edges[str(edge)], nodes[source], like.stride
            )
            for edge, (source, target) in enumerate(CELL_EDGES)
            if target == node and str(edge) in cell.edges
        ]
        nodes[node] = folding.add(f"{name}/{node}", terms, like)
    return folding.concatenate(name, [nodes["x1"], nodes["x2"]])


def _fusion_cell(folding: _Folding, cell: FusionCell, features: Sequence[_Map]) -> _Map:
    graph, finest = cell.graph, features[0].stride
    values = {
        name: folding.apply(f"fusion/{name}", reduce, feature, feature.stride)
        for name, reduce, feature in zip(graph.inputs, cell.reduce, features, strict=True)
    }
    for edge in graph.edges:
        name, stride = f"fusion/{edge.name}", features[edge.level].stride
        x = values[edge.sources[0]]
        if edge.kind != "up":
            parts = [
                folding.resize(f"{name}/{source}", values[source], stride)
                for source in edge.sources
            ]
            x = folding.concatenate(f"{name}/in", parts)
        values[edge.name] = folding.apply(name, cell.edges[edge.name], x, stride)
    finals = [folding.resize(f"fusion/{v}/out", values[v], finest) for v in graph.output]
    return folding.add("fusion", finals, finals[0])


def _pyramid(folding: _Folding, head: ASPP | PPM, x: _Map) -> _Map:
    branches = [
        folding.apply(f"neck/{index}", branch, x, x.stride)
        for index, branch in enumerate(head.branches)
    ]
    if isinstance(head, PPM):
        branches.insert(0, x)
    joined = folding.concatenate("neck/in", branches)
    return folding.apply("neck", head.project, joined, x.stride)

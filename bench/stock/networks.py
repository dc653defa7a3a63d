"""Supernet and derived networks in plain PyTorch.

The modules, parameters and names are LGCNet's own; only what they compute with is replaced: one
operation of torch after the other, as the paper's equations read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgcnet_fast.nn.cell import CELL_EDGES, CELL_NODES, EDGES_PER_CELL, DerivedCell, SearchCell
from lgcnet_fast.nn.fusion import FusionCell
from lgcnet_fast.nn.heads import Classifier
from lgcnet_fast.nn.mixed import MixedOp
from lgcnet_fast.nn.primitives import (
    Deconvolution,
    DepthwiseSeparable,
    FactorizedReduce,
    GlobalPool,
    Interpolate,
    PoolBN,
    ReLUConvBN,
    SeparablePair,
)
from lgcnet_fast.nn.stem import Stem
from lgcnet_fast.space.base import Arch, SegmentationNetwork
from lgcnet_fast.space.networks import Backbone, DerivedNetwork, Supernet

Size = tuple[int, int]


def plain(network: nn.Module) -> nn.Module:
    """`network` itself, computing without `lgcnet_fast.ops`."""
    for module in network.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    return network


def compile_cells(network: nn.Module, part: int = 0, parts: int = 1) -> None:
    """torch.compile, cell by cell: the whole supernet takes longer than most have patience for.

    Only every `parts`-th of the modules, from the one that is number `part`.
    """
    torch._dynamo.config.cache_size_limit = 256  # cells share their code, not their shapes
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    kinds = (SearchCell, DerivedCell, FusionCell, Stem, Classifier)
    found = [module for module in network.modules() if isinstance(module, kinds)]
    for module in found[part::parts]:
        module.compile(dynamic=False, backend=backend)


def resize(x: Tensor, size: Size) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class PlainReLUConvBN(ReLUConvBN):
    forward = nn.Sequential.forward


class PlainClassifier(Classifier):
    forward = nn.Sequential.forward


class PlainPoolBN(PoolBN):
    forward = nn.Sequential.forward


class PlainSeparablePair(SeparablePair):
    forward = nn.Sequential.forward


class PlainSeparable(DepthwiseSeparable):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pointwise(self.depthwise(F.relu(x))))


class PlainGlobalPool(GlobalPool):
    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(F.adaptive_avg_pool2d(F.relu(x), self.bins))
        return self.norm(resize(pooled, (x.shape[-2], x.shape[-1])))


class PlainInterpolate(Interpolate):
    def forward(self, x: Tensor, size: Size) -> Tensor:
        return resize(x, size)


class PlainFactorizedReduce(FactorizedReduce):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (-1, 1, -1, 1))
        return self.norm(torch.cat((self.even(x), self.odd(shifted)), dim=1))


class PlainDeconvolution(Deconvolution):
    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.norm(self.conv(F.relu(x), output_size=list(size)))


class PlainMixedOp(MixedOp):
    """Equation 3 at one edge."""

    def forward(self, weights: Tensor, *inputs: object) -> Tensor:
        row = weights.unbind()
        terms = [
            candidate(*inputs) * row[option]
            for option, candidate in zip(self.options, self.candidates.values(), strict=True)
        ]
        return _sum(terms)


class _PlainNodes(nn.Module):
    """Two nodes, each the sum of its edges."""

    def _nodes(self, s0: Tensor, s1: Tensor, rows: Sequence[tuple[Tensor, ...]]) -> Tensor:
        states = {"i1": self.preprocess0(s0), "i2": self.preprocess1(s1)}
        for node in ("x1", "x2"):
            states[node] = _sum(
                [
                    self._edge(edge)(*rows[edge], states[source])
                    for edge, (source, target) in enumerate(CELL_EDGES)
                    if target == node and self._edge(edge) is not None
                ]
                or [self._zeros(states["i2"])]
            )
        return torch.cat([states[node] for node in CELL_NODES[2:]], dim=1)


class PlainSearchCell(_PlainNodes, SearchCell):
    def forward(self, s0: Tensor, s1: Tensor, z: Tensor) -> Tensor:
        return self._nodes(s0, s1, [(row,) for row in z.unbind()])

    def _edge(self, edge: int) -> nn.Module:
        return self.edges[edge]


class PlainDerivedCell(_PlainNodes, DerivedCell):
    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        return self._nodes(s0, s1, [()] * len(CELL_EDGES))

    def _edge(self, edge: int) -> nn.Module | None:
        return self.edges[str(edge)] if str(edge) in self.edges else None


class PlainBackbone(Backbone):
    def forward(self, x: Tensor, z: Tensor | None = None) -> list[Tensor]:
        s0, s1 = self.stem(x)
        features = []
        for k, cell in enumerate(self.cells):
            rows = () if z is None else (z[k * EDGES_PER_CELL : (k + 1) * EDGES_PER_CELL],)
            s0, s1 = s1, cell(s0, s1, *rows)
            if k in self.taps:
                features.append(s1)
        return features


class PlainStem(Stem):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0 = self.conv2(self.conv1(x))
        return s0, self.conv3(s0)


class PlainDerivedNetwork(DerivedNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return self._logits(self.backbone(x))


class PlainSupernet(Supernet):
    beside = SegmentationNetwork.beside

    def forward(self, x: Tensor, z: Arch) -> Tensor:
        return self._logits(self.backbone(x, z["cells"]), self._fusion_rows(z))


class PlainFusionCell(FusionCell):
    def forward(self, features: Sequence[Tensor], z: Mapping[str, Tensor] | None = None) -> Tensor:
        sizes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        values = {
            name: reduce(feature)
            for name, reduce, feature in zip(self.graph.inputs, self.reduce, features, strict=True)
        }
        for edge in self.graph.edges:
            size = sizes[edge.level]
            weights = () if z is None or edge.kind == "join" else (z[edge.name],)
            sources = [values[source] for source in edge.sources]
            if edge.kind == "up":
                values[edge.name] = self.edges[edge.name](*weights, sources[0], size)
            else:
                joined = torch.cat([resize(source, size) for source in sources], dim=1)
                values[edge.name] = self.edges[edge.name](*weights, joined)
        return _sum([resize(values[name], sizes[0]) for name in self.graph.output])


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


_PLAIN = {
    parent: plain_class
    for plain_class in (
        PlainReLUConvBN,
        PlainClassifier,
        PlainPoolBN,
        PlainSeparablePair,
        PlainSeparable,
        PlainGlobalPool,
        PlainInterpolate,
        PlainFactorizedReduce,
        PlainDeconvolution,
        PlainMixedOp,
        PlainSearchCell,
        PlainDerivedCell,
        PlainStem,
        PlainBackbone,
        PlainDerivedNetwork,
        PlainSupernet,
        PlainFusionCell,
    )
    for parent in (plain_class.__bases__[-1],)
}

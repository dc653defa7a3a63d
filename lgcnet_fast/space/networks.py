"""Supernet, derived network and pretraining classifier over one backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from lgcnet_fast.nn.autocast_weights import WeightCasts, cast_weights
from lgcnet_fast.nn.cell import Cell, DerivedCell, SearchCell, weights_of
from lgcnet_fast.nn.fusion import (
    FUSION_WIDTH,
    FusionCell,
    derived_fusion_cell,
    search_fusion_cell,
)
from lgcnet_fast.nn.fusion_graphs import FusionGraph
from lgcnet_fast.nn.heads import ASPP, ASPP_WIDTH, PPM, PPM_WIDTH, Classifier
from lgcnet_fast.nn.primitives import Source
from lgcnet_fast.nn.stem import Stem
from lgcnet_fast.nn.together import Part, together, worked
from lgcnet_fast.ops import gathered_running_statistics, packed_weights
from lgcnet_fast.space.base import Arch, SegmentationNetwork
from lgcnet_fast.space.layout import CellLayout, MacroLayout
from lgcnet_fast.space.lgcnet_genotype import LGCNetGenotype


class Backbone(nn.Module):
    """Stem and cells; returns the outputs of the tapped cells, finest first."""

    def __init__(
        self,
        layout: MacroLayout,
        make_cell: Callable[[int, CellLayout], Cell],
        taps_rectified: bool,
    ) -> None:
        """taps_rectified: all that reads the outputs begins with a ReLU, as fusion cells do."""
        super().__init__()
        self.taps = layout.taps
        self.taps_rectified = taps_rectified
        self.stem = Stem(layout.stem.widths, layout.stem.strides)
        self.cells = nn.ModuleList(make_cell(k, cell) for k, cell in enumerate(layout.cells))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Sequence[Tensor | Source]:
        """x: (N, 3, H, W); z: (cells * 5, 8) for search cells, none for derived cells.

        Returns sources where `taps_rectified`.
        """
        return self.behind_stem(*self.stem(x), z)

    def behind_stem(
        self, stem0: Tensor, stem1: Tensor, z: Tensor | None
    ) -> Sequence[Tensor | Source]:
        """`forward` from the maps of the stem on."""
        # The ReLU that ends the second stage of the stem keeps its output.
        s0, s1 = Source(stem0), Source(stem1, only_rectified=True)
        choices: Sequence[tuple[Sequence[Tensor], ...]] = [()] * len(self.cells)
        if z is not None:
            choices = [(weights,) for weights in weights_of(cast(list[SearchCell], self.cells), z)]
        features: list[Tensor | Source] = []
        cells = cast(Sequence[Cell[Any]], self.cells)
        begun = cells[0].begin(s0)
        (maps,) = worked([begun])
        for k, (cell, choice) in enumerate(zip(cells, choices, strict=True)):
            # The next cell does beside this one what needs no more than s1.
            works = [cell.end(s1, begun.terms, maps, *choice)]
            if k + 1 < len(cells):
                begun = cells[k + 1].begin(s1)
                works.append(begun)
            halves, *others = worked(works)
            maps = others[0] if others else []
            only_rectified = self.taps_rectified or k not in self.taps
            s1 = Source(*halves, only_rectified=only_rectified)
            # They may die now that they are concatenated.
            del works, halves
            if k in self.taps:
                features.append(s1 if self.taps_rectified else s1.plain())
        return features


class Network(SegmentationNetwork):
    """Backbone, head and classifier."""

    def __init__(
        self, layout: MacroLayout, head: str, backbone: Backbone, neck: nn.Module, num_classes: int
    ) -> None:
        super().__init__()
        self.output_stride = layout.output_stride
        self.backbone = backbone
        self.neck = neck
        self.classifier = Classifier(neck_channels(layout, head), num_classes)

    def _logits(
        self, features: Sequence[Tensor | Source], z: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        if isinstance(self.neck, FusionCell):
            return self.classifier(self.neck(features, z))
        return self.classifier(self.neck(features[-1]))


class Supernet(Network):
    """All candidates of every edge, weighted by Z."""

    def __init__(
        self, layout: MacroLayout, head: str, graph: FusionGraph | None, num_classes: int
    ) -> None:
        channels = layout.tap_channels
        if graph is None:
            neck = fixed_neck(head, channels[-1], affine=False)
        else:
            neck = search_fusion_cell(graph, channels)
        backbone = Backbone(layout, _search_cell, taps_rectified=graph is not None)
        super().__init__(layout, head, backbone, neck, num_classes)
        self.fusion_edges = () if graph is None else (*graph.op_edges, *graph.up_edges)

    def forward(self, x: Tensor, z: Arch) -> Tensor:
        """x: (N, 3, H, W); z: group -> (rows, options). Returns the logits at output stride."""
        with few_launches(self):
            features = self.backbone(x, z["cells"])
            return self._logits(features, self._fusion_rows(z))

    def beside(
        self, x: Tensor, choices: Part, z_of: Callable[[Sequence[Tensor]], Arch]
    ) -> tuple[Tensor, list[Tensor]]:
        """As in `SegmentationNetwork`; Z is computed beside the stem."""
        if torch.compiler.is_compiling():
            results = list(choices.compute(*choices.inputs))
            return self.forward(x, z_of(results)), results
        stem = self.backbone.stem
        casts = WeightCasts(self, without=stem)

        def of_stem(x: Tensor) -> tuple[Tensor, Tensor]:
            with cast_weights(stem):
                return stem(x)

        with gathered_running_statistics(), ExitStack() as rest:

            def prepare() -> None:
                rest.enter_context(packed_weights(self))
                casts.make()

            maps, results = together([Part(of_stem, [x], [stem]), choices], [prepare])
            rest.enter_context(casts.in_place())
            z = z_of(results)
            features = self.backbone.behind_stem(*maps, z["cells"])
            return self._logits(features, self._fusion_rows(z)), results

    def _fusion_rows(self, z: Arch) -> dict[str, Tensor]:
        """The row of each edge of the fusion cell, if there is one."""
        if not self.fusion_edges:
            return {}
        rows = (*z["fusion"].unbind(), *z["up"].unbind())
        names = (edge.name for edge in self.fusion_edges)
        return dict(zip(names, rows, strict=True))


class DerivedNetwork(Network):
    """One operation an edge, as a genotype says."""

    def __init__(self, genotype: LGCNetGenotype, num_classes: int) -> None:
        layout, fusion = genotype.layout, genotype.fusion
        channels = layout.tap_channels
        if fusion is None:
            neck = fixed_neck(genotype.head, channels[-1])
        else:
            neck = derived_fusion_cell(fusion.graph, channels, fusion.ops)
        backbone = derived_backbone(genotype, taps_rectified=fusion is not None)
        super().__init__(layout, genotype.head, backbone, neck, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes, H / output_stride, W / output_stride), rounded up."""
        with few_launches(self):
            return self._logits(self.backbone(x))


class PretrainingClassifier(nn.Module):
    """Derived backbone, global average pooling of its last cell, linear layer: (N, classes)."""

    def __init__(self, genotype: LGCNetGenotype, num_classes: int) -> None:
        super().__init__()
        self.backbone = derived_backbone(genotype)
        self.linear = nn.Linear(genotype.layout.tap_channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        with few_launches(self):
            last = self.backbone(x)[-1]
        return self.linear(last.mean(dim=(2, 3)))


def few_launches(network: nn.Module) -> AbstractContextManager[None]:
    """For a forward pass, whose small work on all parameters is then done together.

    What compilers trace goes without.
    """
    return nullcontext() if torch.compiler.is_compiling() else _few_launches(network)


@contextmanager
def _few_launches(network: nn.Module) -> Iterator[None]:
    # Casts put other tensors in the place of parameters.
    with gathered_running_statistics(), packed_weights(network), cast_weights(network):
        yield


def fixed_neck(head: str, c_in: int, affine: bool = True) -> nn.Module:
    """A head without architecture parameters."""
    if head == "aspp":
        return ASPP(c_in, affine)
    return PPM(c_in, affine) if head == "ppm" else nn.Identity()


def neck_channels(layout: MacroLayout, head: str) -> int:
    """Channels in front of the classifier."""
    widths = {"dcfc": FUSION_WIDTH, "mscell": FUSION_WIDTH, "aspp": ASPP_WIDTH, "ppm": PPM_WIDTH}
    return widths.get(head, layout.tap_channels[-1])


def derived_backbone(genotype: LGCNetGenotype, taps_rectified: bool = False) -> Backbone:
    def make_cell(k: int, cell: CellLayout) -> DerivedCell:
        return DerivedCell(
            cell.c_in0,
            cell.c_in1,
            cell.channels,
            cell.reduction,
            cell.reduce_first,
            genotype.cells[k],
        )

    return Backbone(genotype.layout, make_cell, taps_rectified)


def _search_cell(k: int, cell: CellLayout) -> SearchCell:
    return SearchCell(cell.c_in0, cell.c_in1, cell.channels, cell.reduction, cell.reduce_first)

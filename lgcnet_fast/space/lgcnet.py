"""The LGCNet search space: independent cells that communicate through a graph-guided module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lgcnet_fast.errors import GenotypeError
from lgcnet_fast.nn.cell import CELL_EDGES, EDGES_PER_CELL
from lgcnet_fast.nn.fusion_graphs import FUSION_GRAPHS, FusionGraph
from lgcnet_fast.nn.graph import INIT_STD, CellCommunication, Communication
from lgcnet_fast.nn.operations import CELL_OPS, FUSION_OPS, LIGHT_OPS, UP_OPS
from lgcnet_fast.space.base import (
    Arch,
    ArchGroup,
    LatencyModel,
    LutKey,
    LutModule,
    SearchSpace,
    SegmentationNetwork,
    SpaceOptions,
)
from lgcnet_fast.space.layout import (
    CellIndex,
    Head,
    MacroLayout,
    StemShape,
    StemStride,
    Width,
    check_macro,
    default_taps,
    macro_layout,
)
from lgcnet_fast.space.lgcnet_genotype import LGCNetGenotype
from lgcnet_fast.space.lgcnet_keys import NetworkKeys, engine_keys, network_keys
from lgcnet_fast.space.lgcnet_latency import LGCNetLatency
from lgcnet_fast.space.lgcnet_lut import lut_module
from lgcnet_fast.space.networks import DerivedNetwork, PretrainingClassifier, Supernet
from lgcnet_fast.space.reachability import connect_taps


class LGCNetOptions(SpaceOptions):
    """The defaults are the paper's network."""

    cells: Annotated[int, Field(strict=True, ge=1, le=256)] = 14
    reductions: tuple[CellIndex, ...] = (1, 8)
    widths: tuple[Width, ...] = (32, 64, 128)
    """Node channels before the first reduction, after the first, and so on."""
    stem_widths: tuple[Width, Width, Width] | None = None
    """None: 8, 16 and the first of `widths`."""
    stem_strides: tuple[StemStride, StemStride, StemStride] = (2, 2, 1)
    head: Head = "dcfc"
    fusion: Literal["topdown13", "grid13"] = "topdown13"
    """Fusion graph of head `dcfc`."""
    taps: tuple[CellIndex, ...] | None = None
    """Cells that the head reads; none: the last cell of each of the deepest stages."""
    communication: Communication = "gcn"
    gamma: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.5
    gcn_width: Annotated[int, Field(strict=True, ge=1, le=4096)] = 64
    gcn_relu: bool = False
    n_fc: Literal[1, 2] = 1
    """Linear layers in each of Phi_1 and Phi_2."""
    chain: bool = False
    """Feed alpha' of the previous cell, not its raw alpha."""
    search_width_mult: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """Cell widths of the supernet by those of derived networks and of the lookup table."""

    @model_validator(mode="after")
    def _fits_together(self) -> LGCNetOptions:
        check_macro(self.cells, self.reductions, self.widths, self.resolved_taps, self.head)
        if any(width * self.search_width_mult % 1 for width in self.widths):
            raise ValueError(
                f"search_width_mult {self.search_width_mult} does not give whole channels of "
                f"widths {list(self.widths)}"
            )
        StemShape(widths=self.stem.widths, strides=self.stem_strides)
        return self

    @property
    def resolved_taps(self) -> tuple[int, ...]:
        if self.taps is None:
            return default_taps(self.cells, self.reductions, self.head)
        return self.taps

    @property
    def stem(self) -> StemShape:
        return StemShape(
            widths=self.stem_widths or (8, 16, self.widths[0]), strides=self.stem_strides
        )

    @property
    def graph(self) -> FusionGraph | None:
        names = {"dcfc": self.fusion, "mscell": "mscell"}
        return FUSION_GRAPHS[names[self.head]] if self.head in names else None


class LGCNetArch(nn.Module):
    """Logits of the cells, and of the fusion cell where it is searched.

    All logits are drawn before the graph-guided module's weights, so that a seed gives every
    communication mode with logits of their own the same start.
    """

    def __init__(self, space: LGCNet) -> None:
        super().__init__()
        options = space.options
        self.fusion_cell = nn.ParameterDict(
            {
                group.name: torch.empty(len(group.rows), len(group.options)).normal_(1, INIT_STD)
                for group in space.arch_groups()
                if group.name != "cells"
            }
        )
        self.cells = CellCommunication(
            cells=len(space.layout.cells),
            edges=EDGES_PER_CELL,
            options=len(CELL_OPS),
            mode=options.communication,
            reductions=options.reductions,
            width=options.gcn_width,
            gamma=options.gamma,
            n_fc=options.n_fc,
            chain=options.chain,
            relu=options.gcn_relu,
        )

    def forward(self) -> Arch:
        return {"cells": self.cells(), **self.fusion_cell}


class LGCNet(SearchSpace):
    """Architecture groups: `cells` (5 rows a cell), and `fusion` and `up` of searched heads."""

    name = "lgcnet"
    Options = LGCNetOptions
    Genotype: ClassVar[type[LGCNetGenotype]] = LGCNetGenotype
    options: LGCNetOptions

    def __init__(self, options: LGCNetOptions) -> None:
        super().__init__(options)
        self.graph = options.graph
        self.layout = self._layout(options.widths)

    def _layout(self, widths: Sequence[int]) -> MacroLayout:
        options = self.options
        return macro_layout(options.stem, options.reductions, widths, options.resolved_taps)

    # -- search -----------------------------------------------------------------------------

    def arch_groups(self) -> tuple[ArchGroup, ...]:
        rows = tuple(
            f"cell {k} {source}->{target}"
            for k in range(len(self.layout.cells))
            for source, target in CELL_EDGES
        )
        cells = ArchGroup("cells", rows, CELL_OPS, light=LIGHT_OPS)
        if self.graph is None:
            return (cells,)
        op_edges = tuple(edge.name for edge in self.graph.op_edges)
        up_edges = tuple(edge.name for edge in self.graph.up_edges)
        return (
            cells,
            ArchGroup("fusion", op_edges, FUSION_OPS),
            ArchGroup("up", up_edges, UP_OPS),
        )

    def build_arch(self) -> LGCNetArch:
        return LGCNetArch(self)

    def build_supernet(self, num_classes: int) -> Supernet:
        mult = self.options.search_width_mult
        layout = self._layout([int(width * mult) for width in self.options.widths])
        return Supernet(layout, self.options.head, self.graph, num_classes)

    # -- genotypes ----------------------------------------------------------------------------

    def discretise(self, arch: Arch) -> tuple[LGCNetGenotype, tuple[str, ...]]:
        """The zero operation competes like any other; then every tap is connected to the stem."""
        logits = arch["cells"].detach().float().cpu().unflatten(0, (-1, EDGES_PER_CELL))
        choice = logits.argmax(-1).tolist()
        changes = tuple(
            f"cell {k} edge {'->'.join(CELL_EDGES[edge])}: none becomes "
            f"{CELL_OPS[choice[k][edge]]}, so that the taps can be reached"
            for k, edge in connect_taps(logits, choice, self.layout.taps)
        )
        fusion = None
        if self.graph is not None:
            fusion = {"variant": self._variant, "ops": self._fusion_choice(arch)}
        genotype = {
            "stem": self.options.stem,
            "cells": [[CELL_OPS[option] for option in row] for row in choice],
            "reductions": self.options.reductions,
            "widths": self.options.widths,
            "taps": self.layout.taps,
            "head": self.options.head,
            "fusion": fusion,
        }
        return self.Genotype.model_validate(genotype), changes

    @property
    def _variant(self) -> str:
        return "mscell" if self.options.head == "mscell" else self.options.fusion

    def _fusion_choice(self, arch: Arch) -> dict[str, str]:
        return {
            row: group.options[option]
            for group in self.arch_groups()[1:]
            for row, option in zip(group.rows, arch[group.name].argmax(-1).tolist(), strict=True)
        }

    def one_hot(self, genotype: LGCNetGenotype) -> Arch:
        """Raises `GenotypeError` if the genotype is not a network of these options."""
        self._check_member(genotype)
        chosen = {"cells": [op for cell in genotype.cells for op in cell]}
        if genotype.fusion is not None:
            ops = genotype.fusion.ops
            chosen |= {
                group.name: [ops[row] for row in group.rows] for group in self.arch_groups()[1:]
            }
        return {
            group.name: _one_hot(chosen[group.name][: len(group.rows)], group.options)
            for group in self.arch_groups()
        }

    def _check_member(self, genotype: LGCNetGenotype) -> None:
        if not isinstance(genotype, self.Genotype):
            raise GenotypeError(
                f"a genotype of space {genotype.space!r} does not belong to space {self.name!r}"
            )
        wanted = {
            "head": self.options.head,
            "reductions": self.options.reductions,
            "widths": self.options.widths,
            "taps": self.layout.taps,
            "stem": self.options.stem,
            "fusion.variant": self._variant if self.graph else None,
        }
        fusion = genotype.fusion.variant if genotype.fusion else None
        given = {**dict(genotype), "fusion.variant": fusion}
        for key, value in wanted.items():
            if given[key] != value:
                raise GenotypeError(
                    f"the genotype's {key} is {given[key]}, the search space has {value}; "
                    f"give the space the genotype's value"
                )

    def random_genotype(self, generator: torch.Generator) -> LGCNetGenotype:
        groups = self.arch_groups()
        return self.discretise(
            {
                group.name: torch.rand(len(group.rows), len(group.options), generator=generator)
                for group in groups
            }
        )[0]

    @classmethod
    def build(cls, genotype: LGCNetGenotype, num_classes: int) -> SegmentationNetwork:
        return DerivedNetwork(genotype, num_classes)

    @classmethod
    def build_classifier(cls, genotype: LGCNetGenotype, num_classes: int) -> nn.Module:
        return PretrainingClassifier(genotype, num_classes)

    # -- latency ------------------------------------------------------------------------------

    def _keys(self, size: tuple[int, int], num_classes: int) -> NetworkKeys:
        return network_keys(self.layout, self.options.head, self.graph, size, num_classes)

    def lut_keys(self, size: tuple[int, int], num_classes: int) -> tuple[LutKey, ...]:
        return self._keys(size, num_classes).distinct()

    def _engine_keys(self, size: tuple[int, int], num_classes: int) -> NetworkKeys:
        return engine_keys(self.layout, self.options.head, self.graph, size, num_classes)

    def engine_keys(self, size: tuple[int, int], num_classes: int) -> tuple[LutKey, ...]:
        return self._engine_keys(size, num_classes).distinct()

    def fused_rows(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """The edges into each node of a cell; every edge of the fusion cell by itself."""
        nodes = tuple(
            tuple(
                ("cells", EDGES_PER_CELL * cell + edge)
                for edge, (_, target) in enumerate(CELL_EDGES)
                if target == node
            )
            for cell in range(len(self.layout.cells))
            for node in ("x1", "x2")
        )
        return nodes + tuple(rows for rows in super().fused_rows() if rows[0][0] != "cells")

    def lut_module(self, key: LutKey) -> LutModule:
        return lut_module(key, self.options.stem)

    def latency_model(
        self, milliseconds: Mapping[LutKey, float], size: tuple[int, int], num_classes: int
    ) -> LatencyModel:
        """Of a table of whole engines where it has entries for nodes."""
        of_engines = any(key.op == "node.cell" for key in milliseconds)
        keys = self._engine_keys if of_engines else self._keys
        return LGCNetLatency(keys(size, num_classes), milliseconds)


def _one_hot(chosen: Sequence[str], options: Sequence[str]) -> Tensor:
    return torch.eye(len(options))[[options.index(name) for name in chosen]]

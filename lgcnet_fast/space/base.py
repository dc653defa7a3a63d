"""The interface between a search space and everything that is common to all of them.

A search space says which architecture parameters exist, builds the supernet and the derived
networks, and predicts latency from a lookup table. Sampler, schedule, trainer, lookup table and
command line use nothing else, so a new space is one class (LGCNet section 7).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lgcnet_fast.nn.together import Part
from lgcnet_fast.space.genotype import Genotype as AnyGenotype

Arch = dict[str, Tensor]
"""Group name -> tensor (rows, options): logits alpha', or weights Z whose rows sum to 1."""


@dataclass(frozen=True)
class ArchGroup:
    """One kind of architecture decision: every row picks one of the options."""

    name: str
    rows: tuple[str, ...]
    options: tuple[str, ...]
    mask: tuple[tuple[bool, ...], ...] | None = None
    """(rows, options); False marks an option that a shorter row does not have."""
    light: frozenset[str] = frozenset()
    """Options without weights (none, skip, pool), watched by the collapse monitor."""


@dataclass(frozen=True, order=True)
class LutKey:
    """What a lookup-table entry was measured on: one image, NCHW, at the target resolution."""

    op: str
    """Family and operation, e.g. `cell.sep3`, `fusion.gp1`, `up.deconv`, `const.stem`."""
    c_in: int
    c_out: int
    h_in: int
    w_in: int
    stride: int

    def __str__(self) -> str:
        return f"{self.op} {self.c_in}->{self.c_out} {self.h_in}x{self.w_in} s{self.stride}"


@dataclass(frozen=True)
class LutModule:
    """What the table measures for a key: the module in eval mode and the shapes of its inputs."""

    module: nn.Module
    input_shapes: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class LatencyTerms:
    """Expected latency under Z, in the table's milliseconds (equations 8 and 9)."""

    constant: float
    cells: Tensor
    """(cells,): one entry a cell, the fusion cell last."""
    edges: Tensor
    """(edges,): one entry an edge."""

    @property
    def searchable(self) -> Tensor:
        """Scalar: LAT(a), equation 9."""
        return self.cells.sum()

    @property
    def total(self) -> Tensor:
        """Scalar: LAT(a) + the constant part (stem, preprocessing, concatenation, head)."""
        return self.searchable + self.constant


class LatencyModel(nn.Module, ABC):
    """Differentiable prediction of a network's latency from Z. Holds its table as buffers."""

    @abstractmethod
    def forward(self, z: Arch) -> LatencyTerms: ...


class SpaceOptions(BaseModel):
    """Options of a space, from the `[space]` section of a configuration (without `name`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SegmentationNetwork(nn.Module):
    """What supernets and derived networks have in common.

    A derived network's `forward(x)` takes (N, 3, H, W) and returns logits
    (N, classes, H / output_stride, W / output_stride), rounded up; a supernet's takes `(x, z)`.
    """

    output_stride: int
    backbone: nn.Module
    """What pretraining trains."""

    def beside(
        self, x: Tensor, choices: Part, z_of: Callable[[Sequence[Tensor]], Arch]
    ) -> tuple[Tensor, list[Tensor]]:
        """A supernet's forward pass with a Z that is still to be computed: logits and results.

        choices: computes it; z_of: takes it from the results. Where both can run side by side, a
        supernet may begin before Z is there.
        """
        results = list(choices.compute(*choices.inputs))
        logits: Tensor = self(x, z_of(results))
        return logits, results


class SearchSpace(ABC):
    """A family of networks that can be searched."""

    name: ClassVar[str]
    Options: ClassVar[type[SpaceOptions]]
    Genotype: ClassVar[type[AnyGenotype]]
    """What `one_hot`, `build` and `build_classifier` take."""

    def __init__(self, options: SpaceOptions) -> None:
        self.options = options

    # -- search -----------------------------------------------------------------------------

    @abstractmethod
    def arch_groups(self) -> tuple[ArchGroup, ...]: ...

    @abstractmethod
    def build_arch(self) -> nn.Module:
        """Architecture parameters; `forward()` returns the logits alpha' as an `Arch`."""

    @abstractmethod
    def build_supernet(self, num_classes: int) -> SegmentationNetwork: ...

    # -- genotypes ----------------------------------------------------------------------------

    @abstractmethod
    def discretise(self, arch: Arch) -> tuple[AnyGenotype, tuple[str, ...]]:
        """The genotype of the largest logits, and one line for each change that made it valid."""

    @abstractmethod
    def one_hot(self, genotype: Any) -> Arch:
        """Z of a genotype, float32 on the CPU; the inverse of `discretise`."""

    @abstractmethod
    def random_genotype(self, generator: torch.Generator) -> AnyGenotype:
        """Uniform over all rows, made valid in the way of `discretise`."""

    @classmethod
    @abstractmethod
    def build(cls, genotype: Any, num_classes: int) -> SegmentationNetwork: ...

    @classmethod
    @abstractmethod
    def build_classifier(cls, genotype: Any, num_classes: int) -> nn.Module:
        """Pretraining network: backbone, global average pooling, linear layer: (N, classes).

        Its `backbone` attribute has the state-dict keys of the segmenter's `backbone`.
        """

    # -- latency ------------------------------------------------------------------------------

    @abstractmethod
    def lut_keys(self, size: tuple[int, int], num_classes: int) -> tuple[LutKey, ...]:
        """Every key that `latency_model` looks up for an input of `size` (height, width)."""

    def engine_keys(self, size: tuple[int, int], num_classes: int) -> tuple[LutKey, ...]:
        """The same for a table of whole engines, which may tell apart what they share or skip."""
        return self.lut_keys(size, num_classes)

    def fused_rows(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """All rows as (group, index), those together that engines compute in one launch.

        Engines compile a kernel for each combination of such choices; networks that are made of
        the same combinations share them.
        """
        groups = self.arch_groups()
        return tuple(((group.name, row),) for group in groups for row in range(len(group.rows)))

    @abstractmethod
    def lut_module(self, key: LutKey) -> LutModule: ...

    @abstractmethod
    def latency_model(
        self, milliseconds: Mapping[LutKey, float], size: tuple[int, int], num_classes: int
    ) -> LatencyModel:
        """Linear in the table: half the milliseconds predict half the latency.

        Raises `TableError` naming the first key that the table lacks.
        """

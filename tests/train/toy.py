"""A search space and data small enough for tests that train on one core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lgcnet_fast.space.base import (
    Arch,
    ArchGroup,
    LatencyModel,
    LatencyTerms,
    LutKey,
    LutModule,
    SearchSpace,
    SegmentationNetwork,
    SpaceOptions,
)
from lgcnet_fast.space.genotype import Genotype

OPTIONS = ("none", "skip", "conv1", "conv3")
MILLISECONDS = (0.0, 0.5, 1.0, 3.0)
ROWS = 6
CONSTANT = 1.0


class ToyGenotype(Genotype):
    space: Literal["toy_rows"] = "toy_rows"
    ops: tuple[str, ...]


def _operation(option: str, width: int) -> nn.Module:
    if option == "skip":
        return nn.Identity()
    size = {"conv1": 1, "conv3": 3}[option]
    return nn.Conv2d(width, width, size, padding=size // 2, bias=False)


class ToySupernet(SegmentationNetwork):
    output_stride = 2

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.rows = nn.ModuleList(
            nn.ModuleList(_operation(option, width) for option in OPTIONS[1:]) for _ in range(ROWS)
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor, z: Arch) -> Tensor:
        x = self.stem(x)
        for row, weights in zip(self.rows, z["rows"], strict=True):
            x = x + sum(w * op(x.relu()) for w, op in zip(weights[1:], row, strict=True))
        return self.head(x)


class ToyBackbone(nn.Sequential):
    def __init__(self, genotype: ToyGenotype, width: int = 4) -> None:
        kept = [_operation(op, width) for op in genotype.ops if op != "none"]
        super().__init__(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), *kept)


class ToyNetwork(SegmentationNetwork):
    output_stride = 2

    def __init__(self, genotype: ToyGenotype, num_classes: int) -> None:
        super().__init__()
        self.backbone = ToyBackbone(genotype)
        self.head = nn.Conv2d(4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class ToyClassifier(nn.Module):
    def __init__(self, genotype: ToyGenotype, num_classes: int) -> None:
        super().__init__()
        self.backbone = ToyBackbone(genotype)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


class ToyArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(0.01 * torch.randn(ROWS, len(OPTIONS)))

    def forward(self) -> Arch:
        return {"rows": self.rows}


class ToyLatency(LatencyModel):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("milliseconds", torch.tensor(MILLISECONDS))

    def forward(self, z: Arch) -> LatencyTerms:
        edges = (z["rows"] * self.milliseconds).sum(-1)
        return LatencyTerms(CONSTANT, edges.view(2, -1).sum(1), edges)


class ToySpace(SearchSpace):
    name = "toy_rows"

    class Options(SpaceOptions):
        width: int = 4

    Genotype = ToyGenotype

    def arch_groups(self) -> tuple[ArchGroup, ...]:
        rows = tuple(f"row {i}" for i in range(ROWS))
        return (ArchGroup("rows", rows, OPTIONS, light=frozenset({"none", "skip"})),)

    def build_arch(self) -> nn.Module:
        return ToyArch()

    def build_supernet(self, num_classes: int) -> SegmentationNetwork:
        return ToySupernet(num_classes, self.options.width)

    def discretise(self, arch: Arch) -> tuple[ToyGenotype, tuple[str, ...]]:
        picks = arch["rows"].argmax(-1).tolist()
        return ToyGenotype(ops=tuple(OPTIONS[pick] for pick in picks)), ()

    def one_hot(self, genotype: ToyGenotype) -> Arch:
        picks = torch.tensor([OPTIONS.index(op) for op in genotype.ops])
        return {"rows": nn.functional.one_hot(picks, len(OPTIONS)).float()}

    def random_genotype(self, generator: torch.Generator) -> ToyGenotype:
        picks = torch.randint(len(OPTIONS), (ROWS,), generator=generator).tolist()
        return ToyGenotype(ops=tuple(OPTIONS[pick] for pick in picks))

    @classmethod
    def build(cls, genotype: ToyGenotype, num_classes: int) -> SegmentationNetwork:
        return ToyNetwork(genotype, num_classes)

    @classmethod
    def build_classifier(cls, genotype: ToyGenotype, num_classes: int) -> nn.Module:
        return ToyClassifier(genotype, num_classes)

    def lut_keys(self, size: tuple[int, int], num_classes: int) -> tuple[LutKey, ...]:
        return (LutKey("const.stem", 3, self.options.width, *size, 2),)

    def lut_module(self, key: LutKey) -> LutModule:
        stem = nn.Conv2d(3, key.c_out, 3, stride=2, padding=1)
        return LutModule(stem, ((1, 3, key.h_in, key.w_in),))

    def latency_model(
        self, milliseconds: Mapping[LutKey, float], size: tuple[int, int], num_classes: int
    ) -> LatencyModel:
        return ToyLatency()

"""A search space of another paper in miniature: operations, and how deep each stage is.

It shares nothing with LGCNet but the interface, so it shows that the engine needs no more. Two
kinds of architecture group: `ops` picks an operation for each step of a stage, `depth` how many of
its steps a stage keeps. Stage 0 has up to three steps and stage 1 up to two, so that the second row
of `depth` is shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lgcnet_fast.errors import TableError
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

OPS = ("skip", "conv1", "conv3")
STEPS = (3, 2)
STEP_ROWS = tuple((stage, step) for stage in range(2) for step in range(STEPS[stage]))


class ToyOptions(SpaceOptions):
    width: int = 4


class ToyGenotype(Genotype):
    space: Literal["toy"] = "toy"
    width: int
    stages: tuple[tuple[Literal["skip", "conv1", "conv3"], ...], ...]
    """Operations of the steps that each stage keeps."""


def _operation(name: str, width: int) -> nn.Module:
    if name == "skip":
        return nn.Identity()
    kernel = {"conv1": 1, "conv3": 3}[name]
    return nn.Conv2d(width, width, kernel, padding=kernel // 2)


class ToySupernet(SegmentationNetwork):
    output_stride = 4

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(
            [nn.Conv2d(3, width, 3, stride=2, padding=1)]
            + [nn.Conv2d(width, width, 3, stride=2, padding=1)]
        )
        self.steps = nn.ModuleList(
            nn.ModuleList(_operation(name, width) for name in OPS) for _ in STEP_ROWS
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor, z: Arch) -> Tensor:
        row = 0
        for stage, reduce in enumerate(self.backbone):
            x = reduce(x).relu()
            paths = []
            for _ in range(STEPS[stage]):
                x = sum(
                    w * op(x) for w, op in zip(z["ops"][row], self.steps[row], strict=True)
                ).relu()
                paths.append(x)
                row += 1
            kept = z["depth"][stage]
            x = sum(kept[i] * path for i, path in enumerate(paths))
        return self.head(x)


class ToyBackbone(nn.Module):
    def __init__(self, genotype: ToyGenotype) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, names in enumerate(genotype.stages):
            c_in = genotype.width if stage else 3
            layers += [nn.Conv2d(c_in, genotype.width, 3, stride=2, padding=1), nn.ReLU()]
            for name in names:
                layers += [_operation(name, genotype.width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ToyNetwork(SegmentationNetwork):
    output_stride = 4

    def __init__(self, genotype: ToyGenotype, num_classes: int) -> None:
        super().__init__()
        self.backbone = ToyBackbone(genotype)
        self.head = nn.Conv2d(genotype.width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class ToyClassifier(nn.Module):
    def __init__(self, genotype: ToyGenotype, num_classes: int) -> None:
        super().__init__()
        self.backbone = ToyBackbone(genotype)
        self.linear = nn.Linear(genotype.width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.backbone(x).mean((2, 3)))


class ToyArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.Parameter(torch.randn(len(STEP_ROWS), len(OPS)) * 0.01)
        self.depth = nn.Parameter(torch.randn(2, max(STEPS)) * 0.01)

    def forward(self) -> Arch:
        return {"ops": self.ops, "depth": self.depth}


class ToyLatency(LatencyModel):
    """Expected latency under the path probabilities: a step runs if the stage is that deep."""

    def __init__(self, table: Tensor, constant: float) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.constant = constant

    def forward(self, z: Arch) -> LatencyTerms:
        runs = z["depth"].flip(1).cumsum(1).flip(1)
        reached = torch.stack([runs[stage, step] for stage, step in STEP_ROWS])
        edges = (z["ops"] * self.table).sum(1) * reached
        cells = torch.stack([part.sum() for part in edges.split(STEPS)])
        return LatencyTerms(self.constant, cells, edges)


class ToySpace(SearchSpace):
    name = "toy"
    Options = ToyOptions
    Genotype = ToyGenotype
    options: ToyOptions

    def arch_groups(self) -> tuple[ArchGroup, ...]:
        steps = tuple(f"stage {stage} step {step}" for stage, step in STEP_ROWS)
        mask = tuple(tuple(step < count for step in range(max(STEPS))) for count in STEPS)
        return (
            ArchGroup("ops", steps, OPS, light=frozenset({"skip"})),
            ArchGroup("depth", ("stage 0", "stage 1"), ("1", "2", "3"), mask),
        )

    def build_arch(self) -> nn.Module:
        return ToyArch()

    def build_supernet(self, num_classes: int) -> SegmentationNetwork:
        return ToySupernet(self.options.width, num_classes)

    def discretise(self, arch: Arch) -> tuple[ToyGenotype, tuple[str, ...]]:
        ops = arch["ops"].argmax(1).tolist()
        stages, row = [], 0
        for stage, count in enumerate(STEPS):
            depth = int(arch["depth"][stage, :count].argmax()) + 1
            stages.append([OPS[option] for option in ops[row : row + depth]])
            row += count
        return ToyGenotype(width=self.options.width, stages=stages), ()

    def one_hot(self, genotype: ToyGenotype) -> Arch:
        ops = torch.zeros(len(STEP_ROWS), len(OPS))
        depth = torch.zeros(2, max(STEPS))
        for row, (stage, step) in enumerate(STEP_ROWS):
            names = genotype.stages[stage]
            ops[row, OPS.index(names[step]) if step < len(names) else 0] = 1
        for stage, names in enumerate(genotype.stages):
            depth[stage, len(names) - 1] = 1
        return {"ops": ops, "depth": depth}

    def random_genotype(self, generator: torch.Generator) -> ToyGenotype:
        drawn = {
            group.name: torch.rand(len(group.rows), len(group.options), generator=generator)
            for group in self.arch_groups()
        }
        return self.discretise(drawn)[0]

    @classmethod
    def build(cls, genotype: ToyGenotype, num_classes: int) -> SegmentationNetwork:
        return ToyNetwork(genotype, num_classes)

    @classmethod
    def build_classifier(cls, genotype: ToyGenotype, num_classes: int) -> nn.Module:
        return ToyClassifier(genotype, num_classes)

    def _key(self, op: str, stage: int, size: tuple[int, int]) -> LutKey:
        stride = 2 ** (stage + 1)
        width = self.options.width
        return LutKey(op, width, width, -(-size[0] // stride), -(-size[1] // stride), 1)

    def _stem_key(self, size: tuple[int, int]) -> LutKey:
        return LutKey("const.reduce", 3, self.options.width, *size, 2)

    def lut_keys(self, size: tuple[int, int], num_classes: int) -> tuple[LutKey, ...]:
        keys = [self._key(f"toy.{op}", stage, size) for stage in range(2) for op in OPS]
        return (*keys, self._stem_key(size))

    def lut_module(self, key: LutKey) -> LutModule:
        shape = (1, key.c_in, key.h_in, key.w_in)
        if key.op == "const.reduce":
            return LutModule(nn.Conv2d(3, key.c_out, 3, stride=2, padding=1), (shape,))
        return LutModule(_operation(key.op.removeprefix("toy."), key.c_in), (shape,))

    def latency_model(
        self, milliseconds: Mapping[LutKey, float], size: tuple[int, int], num_classes: int
    ) -> LatencyModel:
        for key in self.lut_keys(size, num_classes):
            if key not in milliseconds:
                raise TableError(f"the latency table lacks {key}")
        table = [
            [milliseconds[self._key(f"toy.{op}", stage, size)] for op in OPS]
            for stage, _ in STEP_ROWS
        ]
        return ToyLatency(torch.tensor(table), milliseconds[self._stem_key(size)])
